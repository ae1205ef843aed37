//! The folder with an authority and what it signed. Everything can be asked for again: what is there and fits stays.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Serialize;

use super::authority::{Authority, Purpose, Signed};
use super::{CertificateError, facts};
use crate::domain::{NodeName, Secret};
use crate::private_file::{self, OWNER_ONLY, READABLE};

/// What should be on the shelf.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Host names and addresses of the server.
    pub names: Vec<String>,
    /// Each gets a bundle.
    pub devices: Vec<NodeName>,
    pub days: u32,
    pub authority_days: u32,
    /// Everything anew, the authority too: nothing signed before counts any more.
    pub force: bool,
}

/// What became of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    pub file: PathBuf,
    /// False: it was there and fits.
    pub made: bool,
}

/// A folder of certificates.
#[derive(Debug, Clone)]
pub struct Shelf {
    folder: PathBuf,
}

const DEVICES: &str = "devices";

impl Shelf {
    pub fn new(folder: PathBuf) -> Self {
        Shelf { folder }
    }

    /// Makes what is missing, and the server's certificate anew when it is for other names.
    pub fn init(&self, wish: &Wish) -> Result<Vec<Change>, CertificateError> {
        self.make_folder(&self.folder)?;
        let mut changes = Vec::new();
        let anew = wish.force || !self.has("ca");
        let authority = if anew {
            let (authority, key) = Authority::make(wish.authority_days)?;
            self.put_pair("ca", &authority.certificate, &key)?;
            authority
        } else {
            self.authority()?
        };
        changes.push(self.change("ca.crt", anew));
        let fits = !anew && self.has("server") && self.names_of_server()? == sorted(&wish.names);
        if !fits {
            self.server(&authority, &wish.names, wish.days)?;
        }
        changes.push(self.change("server.crt", !fits));
        let there = !anew && self.has("client");
        if !there {
            self.client(&authority, wish.days)?;
        }
        changes.push(self.change("client.crt", !there));
        for device in &wish.devices {
            let file = device_file(device.as_str());
            let there = !anew && self.folder.join(&file).exists();
            if !there {
                self.device(&authority, device.as_str(), wish.days)?;
            }
            changes.push(self.change(&file, !there));
        }
        Ok(changes)
    }

    /// Signs anew, by the same authority and for the same names, what has at most `within_days` left.
    pub fn renew(&self, within_days: i64, days: u32) -> Result<Vec<Change>, CertificateError> {
        let authority = self.authority()?;
        let now = Timestamp::now();
        let due = |file: &str| -> Result<bool, CertificateError> {
            let found = facts::read(&self.folder.join(file))?;
            Ok(found.first().is_none_or(|first| first.days_left(now) <= within_days))
        };
        let mut changes = Vec::new();
        if self.has("server") {
            let made = due("server.crt")?;
            if made {
                self.server(&authority, &self.names_of_server()?, days)?;
            }
            changes.push(self.change("server.crt", made));
        }
        if self.has("client") {
            let made = due("client.crt")?;
            if made {
                self.client(&authority, days)?;
            }
            changes.push(self.change("client.crt", made));
        }
        for device in self.devices()? {
            let file = device_file(&device);
            let made = due(&file)?;
            if made {
                self.device(&authority, &device, days)?;
            }
            changes.push(self.change(&file, made));
        }
        Ok(changes)
    }

    fn change(&self, file: &str, made: bool) -> Change {
        Change { file: self.folder.join(file), made }
    }

    fn has(&self, name: &str) -> bool {
        let there = |ending: &str| self.folder.join(format!("{name}.{ending}")).exists();
        there("crt") && there("key")
    }

    fn authority(&self) -> Result<Authority, CertificateError> {
        if !self.has("ca") {
            return Err(CertificateError::NoAuthority { folder: self.folder.clone() });
        }
        let text = |name: &str| {
            let path = self.folder.join(name);
            std::fs::read_to_string(&path).map_err(|problem| CertificateError::File {
                what: "read",
                path,
                problem,
            })
        };
        Authority::load(text("ca.crt")?, &Secret::new(text("ca.key")?))
    }

    fn names_of_server(&self) -> Result<Vec<String>, CertificateError> {
        let found = facts::read(&self.folder.join("server.crt"))?;
        Ok(found.first().map(|first| sorted(&first.names)).unwrap_or_default())
    }

    fn devices(&self) -> Result<Vec<String>, CertificateError> {
        let folder = self.folder.join(DEVICES);
        let problem =
            |problem| CertificateError::File { what: "list", path: folder.clone(), problem };
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(problem(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry.map_err(problem)?.file_name().to_string_lossy().into_owned();
            let device = name.strip_suffix(".pem").filter(|name| NodeName::parse(name).is_ok());
            found.extend(device.map(str::to_owned));
        }
        found.sort();
        Ok(found)
    }

    fn server(
        &self,
        authority: &Authority,
        names: &[String],
        days: u32,
    ) -> Result<(), CertificateError> {
        let names = sorted(names);
        let common_name = names.first().map_or("telemetry server", String::as_str);
        let signed = authority.sign(Purpose::Server, common_name, &names, days)?;
        self.put_pair("server", &signed.certificate, &signed.key)
    }

    fn client(&self, authority: &Authority, days: u32) -> Result<(), CertificateError> {
        let signed = authority.sign(Purpose::Client, "telemetry", &[], days)?;
        self.put_pair("client", &signed.certificate, &signed.key)
    }

    fn device(
        &self,
        authority: &Authority,
        device: &str,
        days: u32,
    ) -> Result<(), CertificateError> {
        self.make_folder(&self.folder.join(DEVICES))?;
        let Signed { certificate, key } = authority.sign(Purpose::Client, device, &[], days)?;
        let bundle = format!("{certificate}{}{}", key.expose(), authority.certificate);
        self.put(&device_file(device), &bundle, OWNER_ONLY)
    }

    /// The key first: whoever reads between the two finds an old certificate that does not fit, and goes on with what
    /// it had.
    fn put_pair(
        &self,
        name: &str,
        certificate: &str,
        key: &Secret,
    ) -> Result<(), CertificateError> {
        self.put(&format!("{name}.key"), key.expose(), OWNER_ONLY)?;
        self.put(&format!("{name}.crt"), certificate, READABLE)
    }

    fn put(&self, file: &str, text: &str, mode: u32) -> Result<(), CertificateError> {
        let path = self.folder.join(file);
        let written = private_file::replace(&path, text.as_bytes(), mode);
        written.map_err(|problem| CertificateError::File { what: "write", path, problem })
    }

    fn make_folder(&self, folder: &Path) -> Result<(), CertificateError> {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o755).create(folder);
        let path = || folder.to_owned();
        made.map_err(|problem| CertificateError::File { what: "make", path: path(), problem })
    }
}

fn device_file(device: &str) -> String {
    format!("{DEVICES}/{device}.pem")
}

/// As certificates spell them, so that two lists can be compared.
fn sorted(names: &[String]) -> Vec<String> {
    let spelled = |name: &String| {
        let address = name.parse::<std::net::IpAddr>().map(|address| address.to_string());
        address.unwrap_or_else(|_| name.to_lowercase())
    };
    let mut names: Vec<_> = names.iter().map(spelled).collect();
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::tls;

    fn wish(names: &[&str]) -> Wish {
        Wish {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            devices: vec![NodeName::parse("meter-1").unwrap()],
            days: 397,
            authority_days: 3650,
            force: false,
        }
    }

    fn made(changes: &[Change]) -> Vec<String> {
        let made = changes.iter().filter(|change| change.made);
        made.map(|change| change.file.file_name().unwrap().to_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn what_is_there_stays_and_other_names_are_signed_by_the_same_authority() {
        let folder = tempfile::tempdir().unwrap();
        let shelf = Shelf::new(folder.path().join("tls"));
        let first = shelf.init(&wish(&["broker.lan", "192.0.2.7", "::1"])).unwrap();
        assert_eq!(made(&first), ["ca.crt", "server.crt", "client.crt", "meter-1.pem"]);
        let again = shelf.init(&wish(&["::1", "BROKER.lan", "192.0.2.7"])).unwrap();
        assert_eq!(made(&again), Vec::<String>::new());
        let authority = std::fs::read(shelf.folder.join("ca.crt")).unwrap();
        let other = shelf.init(&wish(&["broker.lan", "192.0.2.8"])).unwrap();
        assert_eq!(made(&other), ["server.crt"]);
        assert_eq!(std::fs::read(shelf.folder.join("ca.crt")).unwrap(), authority);
        let server = facts::read(&shelf.folder.join("server.crt")).unwrap().remove(0);
        assert_eq!(server.names, ["192.0.2.8", "broker.lan"]);
        // 397 within the very second it was made.
        assert!((396..=397).contains(&server.days_left(Timestamp::now())), "{server:?}");
        let forced = shelf.init(&Wish { force: true, ..wish(&["broker.lan"]) }).unwrap();
        assert_eq!(made(&forced).len(), 4);
        assert_ne!(std::fs::read(shelf.folder.join("ca.crt")).unwrap(), authority);
    }

    #[test]
    fn keys_and_bundles_are_the_owners_alone() {
        let folder = tempfile::tempdir().unwrap();
        let shelf = Shelf::new(folder.path().to_owned());
        shelf.init(&wish(&["localhost"])).unwrap();
        for (file, mode) in [
            ("ca.key", 0o600),
            ("server.key", 0o600),
            ("client.key", 0o600),
            ("devices/meter-1.pem", 0o600),
            ("ca.crt", 0o644),
        ] {
            let found = std::fs::metadata(folder.path().join(file)).unwrap().permissions().mode();
            assert_eq!(found & 0o777, mode, "{file}");
        }
        let bundle = facts::read(&folder.path().join("devices/meter-1.pem")).unwrap();
        assert_eq!(bundle.len(), 2);
        assert!(bundle[1].authority && bundle[0].issuer == bundle[1].subject, "{bundle:?}");
        let path = |name: &str| folder.path().join(name);
        tls::certified_key(&path("server.crt"), &path("server.key")).unwrap();
    }

    #[test]
    fn only_what_is_due_is_renewed() {
        let folder = tempfile::tempdir().unwrap();
        let shelf = Shelf::new(folder.path().to_owned());
        assert!(matches!(shelf.renew(30, 397), Err(CertificateError::NoAuthority { .. })));
        shelf.init(&Wish { days: 20, ..wish(&["localhost"]) }).unwrap();
        assert_eq!(made(&shelf.renew(10, 397).unwrap()), Vec::<String>::new());
        let renewed = shelf.renew(30, 397).unwrap();
        assert_eq!(made(&renewed), ["server.crt", "client.crt", "meter-1.pem"]);
        let server = facts::read(&folder.path().join("server.crt")).unwrap().remove(0);
        assert_eq!(
            (server.names, server.issuer.as_str()),
            (vec!["localhost".to_owned()], "CN=telemetry authority")
        );
        assert_eq!(made(&shelf.renew(30, 397).unwrap()), Vec::<String>::new());
    }

    #[test]
    fn a_name_that_is_none_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let shelf = Shelf::new(folder.path().to_owned());
        let refused = shelf.init(&wish(&["not a name"]));
        assert!(matches!(refused, Err(CertificateError::Name { .. })), "{refused:?}");
    }
}
