//! How a server is reached: TLS, passwords from outside the file.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustls_pki_types::ServerName;

use super::Context;
use super::password::{self, Password};
use super::schema::*;
use super::section::Section;
use super::settings::{CertificateFiles, TlsSettings};
use crate::domain::{Presented, Secret};

pub const PASSWORD_REFUSED: (&str, &str) = (
    "password",
    "a password does not belong in this file; name its place with password_file, \
             password_credential or password_env",
);

pub const PASSWORD_FILE: Setting = optional(
    "password_file",
    Kind::SecretFile,
    "no password",
    "File that holds the password and nothing else; readable by the node's user only.",
);
pub const PASSWORD_CREDENTIAL: Setting = optional(
    "password_credential",
    Kind::SecretCredential,
    "no password",
    "Name of a systemd credential (`LoadCredential=`) that holds the password. Outside systemd \
     the file of this name in `credentials/` beside the main file, so that root can check what \
     the service will run with.",
);
pub const PASSWORD_ENV: Setting = optional(
    "password_env",
    Kind::SecretEnvironment,
    "no password",
    "Name of an environment variable that holds the password. A file or credential is safer.",
);

/// The folder systemd loads credentials from, by convention.
const CREDENTIALS_BESIDE: &str = "credentials";

pub static TLS: Group = Group {
    doc: "TLS 1.2 or newer. The server's certificate and name are always checked.",
    settings: &[
        optional(
            "ca_file",
            Kind::Path,
            "the public web authorities",
            "PEM file of the authority that signed the server's certificate. For a Kafka cluster without \
             it the authorities count that this machine trusts.",
        ),
        optional(
            "certificate_file",
            Kind::Path,
            "no client certificate",
            "PEM file of the node's own certificate, for servers that ask for one.",
        ),
        optional("key_file", Kind::Path, "no client certificate", "PEM file of its private key."),
        optional(
            "server_name",
            Kind::Text,
            "the host connected to",
            "The name the server's certificate must carry. A Kafka broker's carries the host it \
             advertises.",
        ),
    ],
    refused: &[(
        "insecure",
        "there is no way to skip the check of a certificate; give its ca_file",
    )],
};

pub fn tls(section: &Section, context: &mut Context<'_>) -> TlsSettings {
    let ca_file = readable(section, "ca_file", context);
    let certificate = readable(section, "certificate_file", context);
    let key = readable(section, "key_file", context);
    if section.has("certificate_file") != section.has("key_file") {
        let given = if section.has("key_file") { "key_file" } else { "certificate_file" };
        let rule = "a client certificate needs both certificate_file and key_file";
        context.problems.error(section.at(given), rule);
    }
    if let Some(key) = &key {
        warn_of_readers(key, section, "key_file", context);
    }
    let server_name = section.optional_text("server_name");
    if server_name.as_deref().is_some_and(|name| ServerName::try_from(name).is_err()) {
        let rule = "is no host name or address that a certificate can carry";
        context.problems.error(section.at("server_name"), rule);
    }
    TlsSettings {
        ca_file,
        client_certificate: certificate.zip(key),
        server_name,
        presented: Presented::default(),
    }
}

/// A server's own certificate. None when a file is not named, which is reported elsewhere.
pub fn certificate(section: &Section, context: &mut Context<'_>) -> Option<CertificateFiles> {
    let certificate = readable(section, "certificate_file", context)?;
    let key = readable(section, "key_file", context)?;
    warn_of_readers(&key, section, "key_file", context);
    Some(CertificateFiles { certificate, key })
}

/// The path of a file that can be opened, or is reported.
fn readable(section: &Section, name: &'static str, context: &mut Context<'_>) -> Option<PathBuf> {
    let path = context.resolve(&section.optional_text(name)?);
    if let Err(error) = std::fs::File::open(&path) {
        let rule = format!("cannot read {}: {error}", path.display());
        context.problems.error(section.at(name), rule);
    }
    Some(path)
}

/// The password from whichever of the three places is named; more than one is refused.
pub fn password(section: &Section, context: &mut Context<'_>) -> Option<Password> {
    let places = ["password_file", "password_credential", "password_env"];
    let mut given = places.into_iter().filter(|name| section.has(name));
    let name = given.next()?;
    if let Some(second) = given.next() {
        let rule = format!("only one of {name} and {second}");
        context.problems.error(section.at(second), rule);
    }
    let target = section.optional_text(name)?;
    let file = match name {
        "password_env" => None,
        "password_credential" => match credential(&target, context) {
            Ok(file) => Some(file),
            Err(rule) => {
                context.problems.error(section.at(name), rule);
                return None;
            }
        },
        _ => Some(context.resolve(&target)),
    };
    let found = match &file {
        Some(file) => from_file(file, section, name, context),
        None => from_environment(&target, context),
    };
    match found {
        Ok(text) if text.is_empty() => {
            context.problems.error(section.at(name), format!("{target} is empty"));
            None
        }
        Ok(text) => {
            let secret = Secret::new(text);
            Some(match file {
                Some(file) => Password::in_file(file, secret),
                None => secret.into(),
            })
        }
        Err(rule) => {
            context.problems.error(section.at(name), rule);
            None
        }
    }
}

fn from_environment(variable: &str, context: &Context<'_>) -> Result<String, String> {
    let missing = || format!("the environment variable {variable} is not set");
    (context.environment)(variable).ok_or_else(missing)
}

fn credential(credential: &str, context: &Context<'_>) -> Result<PathBuf, String> {
    let given = (context.environment)("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    let beside = Some(context.resolve(CREDENTIALS_BESIDE)).filter(|folder| folder.is_dir());
    let Some(folder) = given.or(beside) else {
        return Err(format!(
            "no credential {credential}: CREDENTIALS_DIRECTORY is not set; start under \
             systemd with LoadCredential={credential}:…"
        ));
    };
    Ok(folder.join(credential))
}

fn from_file(
    path: &Path,
    section: &Section,
    name: &'static str,
    context: &mut Context<'_>,
) -> Result<String, String> {
    let text = password::read(path)
        .map_err(|error| format!("cannot read the secret file {}: {error}", path.display()))?;
    warn_of_readers(path, section, name, context);
    Ok(text)
}

fn warn_of_readers(path: &Path, section: &Section, name: &'static str, context: &mut Context<'_>) {
    const READABLE_BY_ALL: u32 = 0o004;
    let mode = std::fs::metadata(path).map_or(0, |metadata| metadata.mode());
    if mode & READABLE_BY_ALL != 0 {
        let rule = format!("{} is readable by every user; chmod 640 or less", path.display());
        context.problems.warn(section.at(name), rule);
    }
}

/// This machine: nothing travels over a network.
pub fn is_local(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || host.starts_with('/')
        || address.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}
