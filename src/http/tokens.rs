//! Tokens: a random text shown once, of which the state directory keeps a hash. Commands replace the file whole; the
//! running node looks at each request whether it was replaced, so that a revoked token is refused at once.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::routes::Scope;
use crate::domain::Secret;
use crate::private_file::{self, Stamp};

/// File name in the state directory.
const TOKENS_FILE: &str = "tokens.json";

/// More are refused: each request with a token is compared with all of them.
const TOKENS_MAX: usize = 100;

/// A larger file is not ours.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Begins every token, so that scanners for leaked secrets can know one.
const PREFIX: &str = "telemetry_";

/// What is kept of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// Names it in lists and logs; no part of the secret.
    pub id: String,
    pub scope: Scope,
    /// Whom or what it is for.
    pub note: String,
    pub created: Timestamp,
    /// None: until it is revoked.
    pub expires: Option<Timestamp>,
    sha256: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    tokens: Vec<Token>,
}

/// The file of tokens could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("cannot {what} {}: {problem}", path.display())]
    File { what: &'static str, path: PathBuf, problem: std::io::Error },
    #[error("{} is no list of tokens ({problem}); remove it and make new tokens", path.display())]
    Damaged { path: PathBuf, problem: String },
    #[error("there are {TOKENS_MAX} tokens already; revoke some")]
    TooMany,
}

/// The tokens of one node.
#[derive(Debug, Clone)]
pub struct TokenFile {
    folder: PathBuf,
    path: PathBuf,
}

impl TokenFile {
    pub fn of(state_dir: &Path) -> Self {
        TokenFile { folder: state_dir.to_owned(), path: state_dir.join(TOKENS_FILE) }
    }

    /// Makes a token; the text exists nowhere else afterwards.
    pub fn create(
        &self,
        scope: Scope,
        expires: Option<Timestamp>,
        note: String,
    ) -> Result<(Token, Secret), TokenError> {
        let _alone = self.lock()?;
        let mut kept = self.read()?;
        if kept.tokens.len() >= TOKENS_MAX {
            return Err(TokenError::TooMany);
        }
        let text = format!("{PREFIX}{}", hex::encode(rand::random::<[u8; 32]>()));
        let token = Token {
            id: hex::encode(rand::random::<[u8; 4]>()),
            scope,
            note,
            created: Timestamp::now(),
            expires,
            sha256: hex::encode(Sha256::digest(&text)),
        };
        kept.tokens.push(token.clone());
        self.write(&kept)?;
        Ok((token, Secret::new(text)))
    }

    /// The oldest first, expired ones too.
    pub fn list(&self) -> Result<Vec<Token>, TokenError> {
        Ok(self.read()?.tokens)
    }

    /// False when there is none of this id.
    pub fn revoke(&self, id: &str) -> Result<bool, TokenError> {
        let _alone = self.lock()?;
        let mut kept = self.read()?;
        let before = kept.tokens.len();
        kept.tokens.retain(|token| token.id != id);
        if kept.tokens.len() == before {
            return Ok(false);
        }
        self.write(&kept)?;
        Ok(true)
    }

    /// Two commands at once must not lose each other's change. Held until the answer is dropped.
    fn lock(&self) -> Result<File, TokenError> {
        let problem =
            |problem| TokenError::File { what: "lock", path: self.folder.clone(), problem };
        let folder = File::open(&self.folder).map_err(problem)?;
        folder.lock().map_err(problem)?;
        Ok(folder)
    }

    fn read(&self) -> Result<Kept, TokenError> {
        let problem = |problem| TokenError::File { what: "read", path: self.path.clone(), problem };
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Kept::default());
            }
            Err(error) => return Err(problem(error)),
        };
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(problem)?;
        serde_json::from_slice(&bytes).map_err(|error| TokenError::Damaged {
            path: self.path.clone(),
            problem: error.to_string(),
        })
    }

    fn write(&self, kept: &Kept) -> Result<(), TokenError> {
        let problem =
            |problem| TokenError::File { what: "write", path: self.path.clone(), problem };
        let bytes = serde_json::to_vec_pretty(kept).map_err(|error| problem(error.into()))?;
        private_file::replace(&self.path, &bytes, private_file::OWNER_ONLY).map_err(problem)
    }
}

/// A token that was presented and counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    pub id: String,
    pub scope: Scope,
}

/// The tokens as the running node knows them.
#[derive(Debug)]
pub struct Verifier {
    file: TokenFile,
    known: Mutex<Known>,
}

/// No file, no tokens: what a node begins with, and what it falls back to while the file cannot be read.
#[derive(Debug, Default)]
struct Known {
    /// Of the file that `tokens` were read from, never of one that could not be read: what mends such a file (its owner,
    /// its rights, a disk that answers again) leaves the stamp as it is.
    stamp: Option<Stamp>,
    tokens: Vec<Token>,
    /// Why the file cannot be read, as it was told last.
    trouble: Option<String>,
}

impl Verifier {
    pub fn new(file: TokenFile) -> Self {
        Verifier { file, known: Mutex::default() }
    }

    /// `None` for a text that is no token, or one that expired or was revoked.
    pub fn verify(&self, text: &str) -> Option<Granted> {
        let digest = hex::encode(Sha256::digest(text));
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        self.refresh(&mut known);
        let now = Timestamp::now();
        let mut granted = None;
        // All are compared, each in constant time: how long it takes says nothing.
        for token in &known.tokens {
            let same = bool::from(token.sha256.as_bytes().ct_eq(digest.as_bytes()));
            if same && token.expires.is_none_or(|expires| expires > now) {
                granted = Some(Granted { id: token.id.clone(), scope: token.scope });
            }
        }
        granted
    }

    /// A file that cannot be read grants nothing, and is tried again at each request.
    fn refresh(&self, known: &mut Known) {
        match self.newer_than(known.stamp) {
            Ok(None) => known.trouble = None,
            Ok(Some(newer)) => *known = newer,
            Err(error) => {
                let trouble = Some(error.to_string());
                if known.trouble != trouble {
                    tracing::error!(event = "tokens_unreadable", %error, "no token counts until it is mended");
                }
                *known = Known { trouble, ..Known::default() };
            }
        }
    }

    /// `None` while the file is the one of `stamp`.
    fn newer_than(&self, stamp: Option<Stamp>) -> Result<Option<Known>, TokenError> {
        let TokenFile { path, .. } = &self.file;
        // Before the content: what is replaced in between is read once more.
        let found = Stamp::of(path).map_err(|problem| TokenError::File {
            what: "look at",
            path: path.clone(),
            problem,
        })?;
        if found == stamp {
            return Ok(None);
        }
        Ok(Some(Known { stamp: found, tokens: self.file.list()?, trouble: None }))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use jiff::ToSpan as _;

    use super::*;

    fn file() -> (tempfile::TempDir, TokenFile) {
        let folder = tempfile::tempdir().unwrap();
        let file = TokenFile::of(folder.path());
        (folder, file)
    }

    #[test]
    fn several_tokens_count_until_they_are_revoked_or_expire() {
        let (_folder, file) = file();
        let verifier = Verifier::new(file.clone());
        let (reader, read) = file.create(Scope::Read, None, "grafana".into()).unwrap();
        let tomorrow = Timestamp::now() + 24.hours();
        let (_, operate) = file.create(Scope::Operate, Some(tomorrow), String::new()).unwrap();
        let yesterday = Timestamp::now() - 24.hours();
        let (_, late) = file.create(Scope::Read, Some(yesterday), String::new()).unwrap();
        let scope = |text: &Secret| verifier.verify(text.expose()).map(|granted| granted.scope);
        assert_eq!(scope(&read), Some(Scope::Read));
        assert_eq!(scope(&operate), Some(Scope::Operate));
        assert_eq!(scope(&late), None);
        assert_eq!(verifier.verify("telemetry_0"), None);
        assert!(file.revoke(&reader.id).unwrap());
        assert!(!file.revoke(&reader.id).unwrap());
        assert_eq!((scope(&read), scope(&operate)), (None, Some(Scope::Operate)));
    }

    #[test]
    fn the_file_holds_no_token_and_is_the_owners_alone() {
        let (_folder, file) = file();
        let (_, text) = file.create(Scope::Read, None, String::new()).unwrap();
        let kept = std::fs::read_to_string(&file.path).unwrap();
        assert!(!kept.contains(text.expose().trim_start_matches(PREFIX)), "{kept}");
        assert_eq!(std::fs::metadata(&file.path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_file_grants_nothing() {
        let (_folder, file) = file();
        let verifier = Verifier::new(file.clone());
        let (_, text) = file.create(Scope::Read, None, String::new()).unwrap();
        assert!(verifier.verify(text.expose()).is_some());
        std::fs::write(&file.path, "{").unwrap();
        assert_eq!(verifier.verify(text.expose()), None);
        assert!(matches!(file.list(), Err(TokenError::Damaged { .. })));
    }

    /// A file given back to its owner has the stamp it had before.
    #[test]
    fn a_file_that_can_be_read_again_counts_though_it_looks_the_same() {
        let (_folder, file) = file();
        let (_, text) = file.create(Scope::Read, None, String::new()).unwrap();
        let good = std::fs::read(&file.path).unwrap();
        let changed = std::fs::metadata(&file.path).unwrap().modified().unwrap();
        let fill = |bytes: &[u8]| {
            std::fs::write(&file.path, bytes).unwrap();
            File::options().write(true).open(&file.path).unwrap().set_modified(changed).unwrap();
            Stamp::of(&file.path).unwrap()
        };
        let verifier = Verifier::new(file.clone());
        let unreadable = fill(&vec![b'{'; good.len()]);
        assert_eq!(verifier.verify(text.expose()), None);
        assert_eq!(fill(&good), unreadable);
        assert!(verifier.verify(text.expose()).is_some());
    }

    #[test]
    fn a_file_that_cannot_even_be_looked_at_grants_nothing_meanwhile() {
        let folder = tempfile::tempdir().unwrap();
        let (state, aside) = (folder.path().join("state"), folder.path().join("aside"));
        std::fs::create_dir(&state).unwrap();
        let file = TokenFile::of(&state);
        let verifier = Verifier::new(file.clone());
        let (_, text) = file.create(Scope::Read, None, String::new()).unwrap();
        let trouble = || verifier.known.lock().unwrap().trouble.clone().unwrap_or_default();
        assert!(verifier.verify(text.expose()).is_some());
        std::fs::rename(&state, &aside).unwrap();
        std::fs::write(&state, "no folder").unwrap();
        assert_eq!(verifier.verify(text.expose()), None);
        assert!(trouble().contains("cannot look at"), "{}", trouble());
        std::fs::remove_file(&state).unwrap();
        std::fs::rename(&aside, &state).unwrap();
        assert!(verifier.verify(text.expose()).is_some());
        assert_eq!(trouble(), "");
    }

    #[test]
    fn their_number_is_bounded() {
        let (_folder, file) = file();
        for _ in 0..TOKENS_MAX {
            file.create(Scope::Read, None, String::new()).unwrap();
        }
        assert!(matches!(file.create(Scope::Read, None, String::new()), Err(TokenError::TooMany)));
    }
}
