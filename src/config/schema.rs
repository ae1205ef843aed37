//! What a configuration may say: one description of every setting, from which the reader,
//! `docs/configuration.md` and the JSON Schema are made, so that they cannot disagree.

/// A table of the file.
#[derive(Debug)]
pub struct Group {
    /// What the table is, in a sentence or two.
    pub doc: &'static str,
    pub settings: &'static [Setting],
    /// Keys people try that are refused for a reason worth telling.
    pub refused: &'static [(&'static str, &'static str)],
}

#[derive(Debug)]
pub struct Setting {
    /// Ends in its unit where it has one.
    pub name: &'static str,
    pub kind: Kind,
    pub absent: Absent,
    /// What it does and what choosing it otherwise costs.
    pub doc: &'static str,
}

/// When the file does not say.
#[derive(Debug, Clone, Copy)]
pub enum Absent {
    Required,
    /// What happens then.
    Nothing(&'static str),
    Default(Literal),
    /// A table that is there even when the file leaves it out.
    Empty,
}

#[derive(Debug, Clone, Copy)]
pub enum Literal {
    Text(&'static str),
    Integer(i64),
    Number(f64),
    Boolean(bool),
}

#[derive(Debug, Clone, Copy)]
pub enum Kind {
    Text,
    /// 1 to 64 of `a-z 0-9 - _`.
    Name,
    /// A name in SQL.
    Identifier,
    /// A name in SQL, or an empty text for "there is none".
    IdentifierOrNone,
    /// Relative to the folder of the main file.
    Path,
    /// `address:port`.
    Address,
    /// A file that must not be readable by everyone; relative like a path.
    SecretFile,
    /// A file in `$CREDENTIALS_DIRECTORY`.
    SecretCredential,
    /// An environment variable.
    SecretEnvironment,
    /// A path into the JSON payload.
    JsonPath,
    JsonPaths,
    Integer(i64, i64),
    Number,
    Boolean,
    Choice(&'static [&'static str]),
    Texts,
    /// Text, number or boolean.
    Scalar,
    Scalars,
    TextMap,
    ScalarMap,
    Section(&'static Group),
    /// Tables by name.
    Sections(&'static Group, KeyRule),
}

/// What the name of a table may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyRule {
    Name,
    Identifier,
}

pub const fn required(name: &'static str, kind: Kind, doc: &'static str) -> Setting {
    Setting { name, kind, absent: Absent::Required, doc }
}

/// `otherwise` says what holds when it is left out.
pub const fn optional(
    name: &'static str,
    kind: Kind,
    otherwise: &'static str,
    doc: &'static str,
) -> Setting {
    Setting { name, kind, absent: Absent::Nothing(otherwise), doc }
}

pub const fn text(
    name: &'static str,
    kind: Kind,
    default: &'static str,
    doc: &'static str,
) -> Setting {
    Setting { name, kind, absent: Absent::Default(Literal::Text(default)), doc }
}

pub const fn integer(
    name: &'static str,
    (min, max): (i64, i64),
    default: i64,
    doc: &'static str,
) -> Setting {
    let absent = Absent::Default(Literal::Integer(default));
    Setting { name, kind: Kind::Integer(min, max), absent, doc }
}

pub const fn number(name: &'static str, default: f64, doc: &'static str) -> Setting {
    Setting { name, kind: Kind::Number, absent: Absent::Default(Literal::Number(default)), doc }
}

pub const fn flag(name: &'static str, default: bool, doc: &'static str) -> Setting {
    Setting { name, kind: Kind::Boolean, absent: Absent::Default(Literal::Boolean(default)), doc }
}

/// A table that always counts, with its defaults.
pub const fn section(name: &'static str, group: &'static Group) -> Setting {
    Setting { name, kind: Kind::Section(group), absent: Absent::Empty, doc: group.doc }
}

/// A table that changes something only when it is there.
pub const fn optional_section(
    name: &'static str,
    group: &'static Group,
    otherwise: &'static str,
) -> Setting {
    let absent = Absent::Nothing(otherwise);
    Setting { name, kind: Kind::Section(group), absent, doc: group.doc }
}

/// Tables by name.
pub const fn sections(name: &'static str, group: &'static Group, rule: KeyRule) -> Setting {
    Setting { name, kind: Kind::Sections(group, rule), absent: Absent::Empty, doc: group.doc }
}

impl std::fmt::Display for Literal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Literal::Text(text) => write!(f, "{text:?}"),
            Literal::Integer(number) => write!(f, "{number}"),
            Literal::Number(number) => write!(f, "{number:?}"),
            Literal::Boolean(flag) => write!(f, "{flag}"),
        }
    }
}

pub const KIB: i64 = 1024;
pub const MIB: i64 = 1024 * KIB;
pub const GIB: i64 = 1024 * MIB;
pub const TIB: i64 = 1024 * GIB;
pub const DAY_SECONDS: i64 = 86_400;
/// Limit of settings in seconds: a year is longer than anything waits.
pub const YEAR_SECONDS: i64 = 366 * DAY_SECONDS;
/// Limit of settings in milliseconds: an hour.
pub const HOUR_MS: i64 = 3_600_000;
