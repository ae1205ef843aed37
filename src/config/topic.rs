//! MQTT topic filters: their rules, and whether two of them can meet one topic.

/// What is wrong with a filter.
pub fn check(filter: &str) -> Result<(), String> {
    const BYTES_MAX: usize = 65_535;
    let filter = match filter.strip_prefix("$share/") {
        None => filter,
        Some(shared) => match shared.split_once('/') {
            Some((group, rest)) if !group.is_empty() && !group.contains(['+', '#']) => rest,
            _ => return Err("a shared subscription is $share/<group>/<filter>".into()),
        },
    };
    if filter.is_empty() || filter.len() > BYTES_MAX || filter.contains('\0') {
        return Err(format!("a topic filter has 1 to {BYTES_MAX} bytes and no NUL"));
    }
    let mut levels = filter.split('/').peekable();
    while let Some(level) = levels.next() {
        if level.contains('#') && (level != "#" || levels.peek().is_some()) {
            return Err("'#' stands alone in the last level only".into());
        }
        if level.contains('+') && level != "+" {
            return Err("'+' stands alone in its level".into());
        }
    }
    Ok(())
}

/// The filter without its shared subscription.
fn plain(filter: &str) -> &str {
    match filter.strip_prefix("$share/").and_then(|shared| shared.split_once('/')) {
        Some((_, rest)) => rest,
        None => filter,
    }
}

/// How many levels each matching topic has; none when that varies.
pub fn levels(filter: &str) -> Option<usize> {
    let filter = plain(filter);
    (!filter.ends_with('#')).then(|| filter.split('/').count())
}

/// The one topic a filter without wildcards matches.
pub fn only_topic(filter: &str) -> Option<&str> {
    let filter = plain(filter);
    (!filter.contains(['+', '#'])).then_some(filter)
}

/// How two filters of one broker relate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlap {
    None,
    Some,
    Equal,
}

pub fn overlap(one: &str, other: &str) -> Overlap {
    let (one, other) = (plain(one), plain(other));
    if one == other {
        return Overlap::Equal;
    }
    let (mut left, mut right) = (one.split('/'), other.split('/'));
    loop {
        return match (left.next(), right.next()) {
            (None, None) => Overlap::Some,
            (Some("#"), _) | (_, Some("#")) => Overlap::Some,
            (Some(a), Some(b)) if a == b || a == "+" || b == "+" => continue,
            _ => Overlap::None,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_follow_the_rules_of_mqtt() {
        for good in ["a", "a/b", "+/events/rpc", "tele/+/STATE", "#", "a/#", "/", "$share/g/a/+"] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in ["", "a/#/b", "a#", "a/b+", "+a/b", "$share/g", "$share//a", "$share/+/a", "a\0"]
        {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn overlap_is_about_topics_that_both_match() {
        for (one, other, expected) in [
            ("a/b", "a/b", Overlap::Equal),
            ("$share/g/a/b", "a/b", Overlap::Equal),
            ("a/+", "a/b", Overlap::Some),
            ("a/#", "a", Overlap::Some),
            ("a/+/c", "+/b/#", Overlap::Some),
            ("a/+", "a/b/c", Overlap::None),
            ("a/b", "a/c", Overlap::None),
            ("+/events/rpc", "tele/+/STATE", Overlap::None),
        ] {
            assert_eq!(overlap(one, other), expected, "{one} {other}");
            assert_eq!(overlap(other, one), expected, "{other} {one}");
        }
    }

    #[test]
    fn levels_are_known_unless_the_filter_is_open() {
        assert_eq!(levels("tele/+/STATE"), Some(3));
        assert_eq!(levels("$share/g/tele/+"), Some(2));
        assert_eq!(levels("tele/#"), None);
    }
}
