//! RFC 9535 singular paths, written without the leading `$.`: is this one?

/// Deeper than any message, and far below the depth a payload may have.
const STEPS_MAX: usize = 32;

/// Names (`a.b`), quoted names (`['a:0']`), indexes (`[0]`). The answer says what is wrong and
/// where.
pub fn check(path: &str) -> Result<(), String> {
    let mut rest = path.strip_prefix('$').unwrap_or(path);
    if rest.is_empty() {
        return Err("a path names at least one member".into());
    }
    let mut first = rest.len() == path.len();
    let mut steps = 0;
    while !rest.is_empty() {
        steps += 1;
        let after = if let Some(inside) = rest.strip_prefix('[') {
            bracket(inside)
        } else if let Some(name) = rest.strip_prefix('.') {
            if first { Err("begins with a dot".into()) } else { shorthand(name) }
        } else if first {
            shorthand(rest)
        } else {
            Err("a dot or a bracket must follow".into())
        };
        rest = after.map_err(|problem: String| {
            let position = path[..path.len() - rest.len()].chars().count() + 1;
            format!("{problem} (at character {position})")
        })?;
        first = false;
    }
    if steps > STEPS_MAX {
        return Err(format!("has {steps} steps; at most {STEPS_MAX} are possible"));
    }
    Ok(())
}

fn shorthand(text: &str) -> Result<&str, String> {
    let begins = |c: char| c.is_ascii_alphabetic() || c == '_' || !c.is_ascii();
    let end = text
        .char_indices()
        .find(|(_, c)| !(begins(*c) || c.is_ascii_digit()))
        .map_or(text.len(), |(at, _)| at);
    let (name, rest) = text.split_at(end);
    if !name.starts_with(begins) || !(rest.is_empty() || rest.starts_with(['.', '['])) {
        let whole = text.split(['.', '[']).next().unwrap_or(text);
        if whole.is_empty() {
            return Err("a member name is missing".into());
        }
        return Err(format!("{whole:?} is no plain name; write it as ['{whole}']"));
    }
    Ok(rest)
}

fn bracket(inside: &str) -> Result<&str, String> {
    match inside.chars().next() {
        Some(quote @ ('\'' | '"')) => quoted(&inside[1..], quote),
        _ => index(inside),
    }
}

fn quoted(text: &str, quote: char) -> Result<&str, String> {
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        if character == '\\' {
            characters.next();
        } else if character == quote {
            let rest = &text[at + 1..];
            return rest.strip_prefix(']').ok_or_else(|| "']' must follow the quoted name".into());
        }
    }
    Err("the quoted name does not end".into())
}

fn index(inside: &str) -> Result<&str, String> {
    let Some((number, rest)) = inside.split_once(']') else {
        return Err("'[' without ']'".into());
    };
    let plain = number.bytes().all(|byte| byte.is_ascii_digit());
    let canonical = number == "0" || !number.starts_with('0');
    if plain && canonical && number.parse::<u32>().is_ok() {
        Ok(rest)
    } else {
        Err(format!(
            "[{number}] is neither an index counted from 0 nor a quoted name: a path names \
             one member"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn singular_paths_pass() {
        for path in [
            "method",
            "activeActualConsumption.total",
            "params['temperature:0'].tC",
            "$.params[\"a b\"][0]",
            "['a.b']",
            "list[1].x",
            "größe",
            "a['it\\'s']",
        ] {
            assert_eq!(check(path), Ok(()), "{path}");
        }
    }

    #[test]
    fn anything_else_is_told_with_its_place() {
        for (path, part) in [
            ("", "at least one"),
            ("$", "at least one"),
            (".a", "begins with a dot (at character 1)"),
            ("a..b", "missing (at character 2)"),
            ("a.temperature:0.tC", "write it as ['temperature:0'] (at character 2)"),
            ("a[*]", "neither an index"),
            ("a[01]", "neither an index"),
            ("a[-1]", "neither an index"),
            ("a['b]", "does not end"),
            ("a[0", "without"),
            ("a[0]b", "a dot or a bracket"),
            ("a['b'x]", "must follow"),
            ("0a", "no plain name"),
        ] {
            let problem = check(path).unwrap_err();
            assert!(problem.contains(part), "{path}: {problem}");
        }
    }
}
