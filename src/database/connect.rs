//! One connection: TLS as configured, a bound on the whole handshake, keepalives that notice a dead peer.

use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, Config, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::error::{DatabaseError, refused};
use crate::config::{DatabaseSettings, DatabaseTls};

/// Connects and starts the connection's own task. The bound covers everything up to "ready for query": a server that
/// accepts and then says nothing would hold a caller for ever.
pub async fn connect(settings: &DatabaseSettings) -> Result<Client, DatabaseError> {
    let limit = settings.connect_timeout;
    match timeout(limit, open(settings)).await {
        Ok(result) => result,
        Err(_) => Err(DatabaseError::ConnectTimedOut { target: target(settings), limit }),
    }
}

fn target(settings: &DatabaseSettings) -> String {
    let DatabaseSettings { dbname, user, host, port, .. } = settings;
    format!("database {dbname} as user {user} at {host}:{port}")
}

async fn open(settings: &DatabaseSettings) -> Result<Client, DatabaseError> {
    let config = client_config(settings);
    let target = || target(settings);
    match settings.tls_mode {
        DatabaseTls::Off => {
            let (client, connection) = config.connect(NoTls).await.map_err(refused(target))?;
            tokio::spawn(drive(connection));
            Ok(client)
        }
        DatabaseTls::VerifyFull => {
            let tls = settings.tls.clone().unwrap_or_default();
            let rustls = crate::tls::client_config(&tls)?;
            let connector = MakeRustlsConnect::new(rustls.as_ref().clone());
            let (client, connection) = config.connect(connector).await.map_err(refused(target))?;
            tokio::spawn(drive(connection));
            Ok(client)
        }
    }
}

/// The connection's task ends with the client or with the first I/O error, which the client's next call reports.
async fn drive(connection: impl Future<Output = Result<(), tokio_postgres::Error>>) {
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a database connection ended");
    }
}

fn client_config(settings: &DatabaseSettings) -> Config {
    let mut config = Config::new();
    config
        .host(&settings.host)
        .port(settings.port)
        .dbname(&settings.dbname)
        .user(&settings.user)
        .application_name("telemetry")
        .connect_timeout(settings.connect_timeout)
        .tcp_user_timeout(settings.statement_timeout)
        .keepalives(true)
        .keepalives_idle(Duration::from_secs(30))
        .keepalives_interval(Duration::from_secs(10))
        .keepalives_retries(3)
        .ssl_mode(match settings.tls_mode {
            DatabaseTls::Off => SslMode::Disable,
            DatabaseTls::VerifyFull => SslMode::Require,
        });
    if let Some(password) = &settings.password {
        config.password(password.current().expose());
    }
    config
}
