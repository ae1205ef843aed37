//! Files of the state directory, harmed while the node is down: one at a time, each in every way a disk or a person
//! does it. Whatever the disk still holds is delivered, what it does not is reported, the node runs on.

mod files;
mod mended;
mod world;

use std::path::Path;

use files::{
    cut_short, delete, empty, exchange, flip, generation, newest, overwrite, replace, zero,
    zero_begin,
};
use world::{Base, Fate};

/// One harm, and what it may cost.
struct Case {
    name: &'static str,
    /// After `kill -9`, otherwise after an orderly stop.
    killed: bool,
    harm: fn(&Path),
    fate: Fate,
}

const fn stopped(name: &'static str, harm: fn(&Path), fate: Fate) -> Case {
    Case { name, killed: false, harm, fate }
}

const fn killed(name: &'static str, harm: fn(&Path), fate: Fate) -> Case {
    Case { name, killed: true, harm, fate }
}

/// The second generation: sealed, and of no special place.
const SEALED: usize = 1;

fn sealed(state: &Path, file: &str) -> std::path::PathBuf {
    generation(state, SEALED).join(file)
}

#[test]
fn a_harmed_generation_costs_at_most_its_own_records() {
    Base::build().judge(&[
        stopped("nothing", |_| {}, Fate::Nothing),
        killed("nothing", |_| {}, Fate::Nothing),
        stopped("sealed db cut short", |s| cut_short(&sealed(s, "db")), Fate::Generation(SEALED)),
        stopped("sealed db, one bit", |s| flip(&sealed(s, "db")), Fate::Blocks(SEALED)),
        stopped("sealed db, a zeroed block", |s| zero(&sealed(s, "db")), Fate::Blocks(SEALED)),
        stopped("sealed db emptied", |s| empty(&sealed(s, "db")), Fate::Generation(SEALED)),
        stopped("sealed db deleted", |s| delete(&sealed(s, "db")), Fate::Generation(SEALED)),
        stopped("sealed db is noise", |s| overwrite(&sealed(s, "db")), Fate::Generation(SEALED)),
        stopped("sealed folder deleted", |s| delete(&sealed(s, "")), Fate::Generation(SEALED)),
        stopped("sealed conf deleted", |s| delete(&sealed(s, "conf")), Fate::Nothing),
        stopped("sealed conf, one bit", |s| flip(&sealed(s, "conf")), Fate::Nothing),
        stopped("first folder deleted", |s| delete(&generation(s, 0)), Fate::Generation(0)),
        stopped("newest db cut short", |s| cut_short(&newest(s).join("db")), Fate::Newest),
        stopped("newest db, one bit", |s| flip(&newest(s).join("db")), Fate::Newest),
        stopped("newest db, a zeroed block", |s| zero(&newest(s).join("db")), Fate::Newest),
        stopped("newest db deleted", |s| delete(&newest(s).join("db")), Fate::Newest),
        stopped("newest folder deleted", |s| delete(&newest(s)), Fate::Newest),
        killed("newest db cut short", |s| cut_short(&newest(s).join("db")), Fate::Newest),
        killed("newest db, one bit", |s| flip(&newest(s).join("db")), Fate::Newest),
        killed("newest db, a zeroed block", |s| zero(&newest(s).join("db")), Fate::Newest),
        killed("newest folder deleted", |s| delete(&newest(s)), Fate::Newest),
        stopped(
            "folders exchanged, and one bit in one of them",
            |s| {
                flip(&generation(s, 1).join("db"));
                exchange(&generation(s, 1), &generation(s, 2));
            },
            Fate::Blocks(SEALED),
        ),
        stopped(
            "folders exchanged, and one of them emptied",
            |s| {
                empty(&generation(s, 1).join("db"));
                exchange(&generation(s, 1), &generation(s, 2));
            },
            Fate::Generation(SEALED),
        ),
    ]);
}

#[test]
fn generations_that_stand_in_each_others_place_are_all_delivered() {
    Base::build().judge(&[
        stopped(
            "db files exchanged",
            |s| exchange(&generation(s, 1).join("db"), &generation(s, 2).join("db")),
            Fate::Nothing,
        ),
        stopped(
            "folders exchanged",
            |s| exchange(&generation(s, 1), &generation(s, 2)),
            Fate::Nothing,
        ),
        killed(
            "the newest and a sealed folder exchanged",
            |s| exchange(&generation(s, 1), &newest(s)),
            Fate::Nothing,
        ),
        stopped(
            "their small files exchanged",
            |s| {
                exchange(
                    &generation(s, 1).join("sealed.json"),
                    &generation(s, 2).join("sealed.json"),
                )
            },
            Fate::Nothing,
        ),
    ]);
}

#[test]
fn a_harmed_small_file_costs_no_record() {
    Base::build().judge(&[
        stopped("sealed.json, one bit", |s| flip(&sealed(s, "sealed.json")), Fate::Nothing),
        stopped("sealed.json emptied", |s| empty(&sealed(s, "sealed.json")), Fate::Nothing),
        stopped("sealed.json deleted", |s| delete(&sealed(s, "sealed.json")), Fate::Nothing),
        stopped("marks, one bit", |s| flip(&s.join("buffer/marks")), Fate::Nothing),
        killed("marks cut short", |s| cut_short(&s.join("buffer/marks")), Fate::Nothing),
        killed("marks zeroed", |s| zero(&s.join("buffer/marks")), Fate::Nothing),
        killed("marks deleted", |s| delete(&s.join("buffer/marks")), Fate::Nothing),
        stopped("identity, one bit", |s| flip(&s.join("buffer/identity")), Fate::Nothing),
        killed("identity emptied", |s| empty(&s.join("buffer/identity")), Fate::Nothing),
        stopped("identity deleted", |s| delete(&s.join("buffer/identity")), Fate::Nothing),
        stopped(
            "identity and marks exchanged",
            |s| exchange(&s.join("buffer/identity"), &s.join("buffer/marks")),
            Fate::Nothing,
        ),
        stopped("losses is noise", |s| replace(&s.join("buffer/losses")), Fate::Nothing),
        killed("letters, one bit", |s| flip(&s.join("buffer/letters")), Fate::Nothing),
        stopped("letters deleted", |s| delete(&s.join("buffer/letters")), Fate::Nothing),
        stopped("ballast deleted", |s| delete(&s.join("ballast")), Fate::Nothing),
        stopped("ballast cut short", |s| cut_short(&s.join("ballast")), Fate::Nothing),
        stopped("lock deleted", |s| delete(&s.join("lock")), Fate::Nothing),
    ]);
}

/// Each of them is counted all the same.
const ALL: u64 = u64::MAX;

#[test]
fn a_harmed_state_database_costs_the_dead_letters_it_hits_and_no_record() {
    Base::build().judge(&[
        stopped("state db, one bit", |s| flip(&s.join("state/db")), Fate::Letters(1)),
        killed("state db, one bit", |s| flip(&s.join("state/db")), Fate::Letters(1)),
        stopped("state db, a zeroed block", |s| zero(&s.join("state/db")), Fate::Letters(3)),
        killed("state db, a zeroed block", |s| zero(&s.join("state/db")), Fate::Letters(3)),
        stopped(
            "state db, its begin zeroed",
            |s| zero_begin(&s.join("state/db")),
            Fate::Letters(3),
        ),
        killed("state conf is noise", |s| replace(&s.join("state/conf")), Fate::Nothing),
        stopped("state conf deleted", |s| delete(&s.join("state/conf")), Fate::Nothing),
        stopped("state db cut short", |s| cut_short(&s.join("state/db")), Fate::Letters(ALL)),
        killed("state db is noise", |s| overwrite(&s.join("state/db")), Fate::Letters(ALL)),
        stopped("state db emptied", |s| empty(&s.join("state/db")), Fate::Letters(ALL)),
        stopped("state db deleted", |s| delete(&s.join("state/db")), Fate::Letters(ALL)),
        stopped("state folder deleted", |s| delete(&s.join("state")), Fate::Letters(ALL)),
        stopped("buffer folder deleted", |s| delete(&s.join("buffer")), Fate::Everything),
        stopped("all is deleted", delete, Fate::Everything),
    ]);
}
