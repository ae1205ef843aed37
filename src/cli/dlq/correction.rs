//! A person's correction of a payload: members set, a JSON patch, or an editor.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::mapping::write_at;

/// How a payload is corrected.
#[derive(Debug, Clone)]
pub enum Correction {
    /// `PATH=VALUE` each.
    Set(Vec<(String, Value)>),
    /// RFC 6902 when it is a list, RFC 7396 (merge patch) when it is an object.
    Patch(Value),
    Editor,
}

/// `PATH=VALUE`: the value is JSON where it is JSON, else text. A quoted name in the path may hold the sign itself.
pub fn parse_set(text: &str) -> Result<(String, Value), String> {
    let mut inside = None;
    let equals = text.char_indices().find(|(_, character)| {
        match (inside, character) {
            (None, '\'' | '"') => inside = Some(*character),
            (Some(quote), end) if quote == *end => inside = None,
            _ => {}
        }
        inside.is_none() && *character == '='
    });
    let (at, _) = equals.ok_or("give it as PATH=VALUE")?;
    let (path, value) = (&text[..at], &text[at + 1..]);
    // The path is tried on nothing, so that a mistake shows before a letter is looked for.
    write_at(&mut Value::Null, path, Value::Null).or_else(|why| {
        match why.contains("is no array") {
            true => Ok(()),
            false => Err(why),
        }
    })?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
    Ok((path.to_owned(), value))
}

/// A patch given as it is, or a file that holds it.
pub fn parse_patch(text: &str) -> Result<Value, String> {
    let given = match text.trim_start().starts_with(['[', '{']) {
        true => text.to_owned(),
        false => std::fs::read_to_string(text).map_err(|error| format!("{text}: {error}"))?,
    };
    serde_json::from_str(&given).map_err(|error| format!("no JSON: {error}"))
}

impl Correction {
    /// The corrected payload.
    pub fn apply(&self, payload: &[u8]) -> anyhow::Result<String> {
        let document = || {
            serde_json::from_slice::<Value>(payload).context(
                "the payload is no JSON: correct it in an editor (without --set and --patch)",
            )
        };
        match self {
            Correction::Set(members) => {
                let mut document = document()?;
                for (path, value) in members {
                    write_at(&mut document, path, value.clone()).map_err(anyhow::Error::msg)?;
                }
                Ok(document.to_string())
            }
            Correction::Patch(patch) => {
                let mut document = document()?;
                if patch.is_array() {
                    let patch: json_patch::Patch = serde_json::from_value(patch.clone())
                        .context("no JSON patch (RFC 6902)")?;
                    json_patch::patch(&mut document, &patch).context("the patch does not apply")?;
                } else {
                    json_patch::merge(&mut document, patch);
                }
                Ok(document.to_string())
            }
            Correction::Editor => edited(payload),
        }
    }
}

/// A copy of the payload for the editor, readable by its owner only; gone when dropped.
struct Draft(PathBuf);

impl Draft {
    fn of(payload: &[u8]) -> std::io::Result<Draft> {
        let name = format!("telemetry-{}.json", uuid::Uuid::new_v4());
        let draft = Draft(std::env::temp_dir().join(name));
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600).open(&draft.0)?.write_all(payload)?;
        Ok(draft)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn edited(payload: &[u8]) -> anyhow::Result<String> {
    let draft = Draft::of(payload).context("write a copy for the editor")?;
    let editor = ["VISUAL", "EDITOR"].into_iter().find_map(std::env::var_os);
    let editor = editor.unwrap_or_else(|| "vi".into());
    run_editor(Path::new(&editor), &draft.0)?;
    let mut text = std::fs::read_to_string(&draft.0).context("read the edited copy")?;
    // An editor ends a file with a newline; a device does not.
    if text.ends_with('\n') && !payload.ends_with(b"\n") {
        text.pop();
    }
    if text.as_bytes() == payload {
        bail!("nothing was changed");
    }
    Ok(text)
}

/// The variable may hold arguments, so a shell takes it apart, as for every other program that asks for an editor.
fn run_editor(editor: &Path, file: &Path) -> anyhow::Result<()> {
    let mut command = Command::new("sh");
    command.arg("-c").arg("eval \"$0 \\\"\\$1\\\"\"").arg(editor).arg(file);
    let status = command.status().with_context(|| format!("start {}", editor.display()))?;
    if !status.success() {
        bail!("the editor {} ended with {status}: nothing is done", editor.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAYLOAD: &[u8] = br#"{"a": {"temperature:0": {"tC": "x"}}, "list": [1, 2]}"#;

    fn set(texts: &[&str]) -> anyhow::Result<String> {
        let members = texts.iter().map(|text| parse_set(text).unwrap()).collect();
        Correction::Set(members).apply(PAYLOAD)
    }

    #[test]
    fn members_are_set_made_and_refused_with_their_path() {
        let fixed = set(&["a['temperature:0'].tC=6.5", "list[1]=7", "new.b=word"]).unwrap();
        let fixed: Value = serde_json::from_str(&fixed).unwrap();
        let expected = serde_json::json!({"a": {"temperature:0": {"tC": 6.5}}, "list": [1, 7],
            "new": {"b": "word"}});
        assert_eq!(fixed, expected);
        assert!(set(&["list[9]=1"]).unwrap_err().to_string().contains("it has 2 items"));
        assert!(set(&["list.a=1"]).unwrap_err().to_string().contains("no object"));
        assert_eq!(parse_set("a['x=y']=1").unwrap(), ("a['x=y']".to_owned(), 1.into()));
        assert!(parse_set("a").is_err());
        assert!(parse_set("a..b=1").is_err());
        assert!(Correction::Set(vec![]).apply(b"no json").is_err());
    }

    #[test]
    fn a_list_is_a_patch_and_an_object_is_merged() {
        let patch = parse_patch(r#"[{"op": "replace", "path": "/list/0", "value": 5}]"#).unwrap();
        let fixed = Correction::Patch(patch).apply(PAYLOAD).unwrap();
        assert!(fixed.contains("[5,2]"), "{fixed}");
        let merged = Correction::Patch(parse_patch(r#"{"list": null}"#).unwrap());
        assert!(!merged.apply(PAYLOAD).unwrap().contains("list"));
        let absent = r#"[{"op": "remove", "path": "/nowhere"}]"#;
        assert!(Correction::Patch(parse_patch(absent).unwrap()).apply(PAYLOAD).is_err());
    }
}
