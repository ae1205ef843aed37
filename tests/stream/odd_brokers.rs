//! Brokers that grant less than was asked for, nothing at all, or nothing for a long time; and two nodes that take one
//! session from each other.

use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use rig::{Mosquitto, MosquittoOptions};
use telemetry::config::{BreakerSettings, Settings, TlsSettings};
use telemetry::domain::Verdict;
use telemetry::observe::{DisconnectReason, StreamStatus, health};
use telemetry::stream::probe;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;
use tokio::time::timeout;
use tracing::Dispatch;
use tracing::subscriber::NoSubscriber;

use super::{LONG, Life, all_payloads, energy, publisher, settings};

const CONNECT: u8 = 1;
const SUBSCRIBE: u8 = 8;
const DISCONNECT: u8 = 14;

/// The broker's end of a connection, which says what the test wants it to.
struct Scripted {
    tcp: TcpStream,
}

impl Scripted {
    /// The next connection, let in; it has asked for its subscription.
    async fn let_in(listener: &TcpListener) -> Self {
        let (tcp, _) = timeout(LONG, listener.accept()).await.expect("it connects").unwrap();
        let mut broker = Scripted { tcp };
        broker.hear(CONNECT).await;
        broker.say(&[0x20, 3, 0, 0, 0]).await;
        broker.hear(SUBSCRIBE).await;
        broker
    }

    /// Reads packets up to the first of this kind.
    async fn hear(&mut self, kind: u8) {
        let reading = async {
            loop {
                let first = self.tcp.read_u8().await.unwrap();
                let (mut length, mut shift) = (0_usize, 0);
                loop {
                    let byte = self.tcp.read_u8().await.unwrap();
                    length |= usize::from(byte & 0x7F) << shift;
                    shift += 7;
                    if byte & 0x80 == 0 {
                        break;
                    }
                }
                self.tcp.read_exact(&mut vec![0; length]).await.unwrap();
                if first >> 4 == kind {
                    return;
                }
            }
        };
        timeout(LONG, reading).await.expect("it says something");
    }

    async fn say(&mut self, bytes: &[u8]) {
        self.tcp.write_all(bytes).await.unwrap();
    }

    /// SUBACK with this code.
    async fn answer(&mut self, code: u8) {
        self.say(&[0x90, 4, 0, 1, 0, code]).await;
    }
}

/// What a broker that cuts, drops and refuses says to a look: a session of an hour and ten messages under way, no
/// subscription to the stream, and seven messages dropped.
async fn stingy(listener: TcpListener) {
    const TOPIC: &[u8] = b"$SYS/broker/publish/messages/dropped";
    let (tcp, _) = timeout(LONG, listener.accept()).await.expect("it connects").unwrap();
    let mut broker = Scripted { tcp };
    broker.hear(CONNECT).await;
    broker.say(&[0x20, 11, 0, 0, 8, 0x11, 0, 0, 0x0E, 0x10, 0x21, 0, 10]).await;
    broker.hear(SUBSCRIBE).await;
    broker.answer(0x87).await;
    broker.hear(SUBSCRIBE).await;
    broker.say(&[0x90, 4, 0, 2, 0, 0]).await;
    let length = u8::try_from(TOPIC.len()).unwrap();
    broker.say(&[0x31, 2 + length + 2, 0, length]).await;
    broker.say(TOPIC).await;
    broker.say(&[0, b'7']).await;
    broker.hear(DISCONNECT).await;
}

#[tokio::test]
async fn a_look_at_a_broker_that_cuts_drops_and_refuses_tells_all_of_it() {
    let (listener, settings) = scripted().await;
    let stream = settings.streams[&energy()].clone();
    let streams = [&stream];
    let look = probe("home", &settings.brokers["home"], &streams);
    let (found, ()) = tokio::join!(look, stingy(listener));
    for (check, verdict, figure) in [
        ("session expiry", Verdict::Fail, "1 h"),
        ("receive maximum", Verdict::Warn, "10"),
        ("granted QoS", Verdict::Fail, "energy (a/#): refused with 0x87"),
        ("dropped by the broker", Verdict::Warn, "7 messages since it started, of all its clients"),
    ] {
        let line = found.iter().find(|line| line.check == check);
        let line = line.unwrap_or_else(|| panic!("{check} in {found:?}"));
        assert_eq!((line.verdict, line.figure.as_str()), (verdict, figure));
        assert!(line.remedy.is_some(), "{line:?}");
    }
}

async fn scripted() -> (TcpListener, Settings) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut settings = settings(listener.local_addr().unwrap().port());
    quick(&mut settings);
    (listener, settings)
}

fn quick(settings: &mut Settings) {
    let home = settings.brokers.get_mut("home").unwrap();
    home.reconnect.min = Duration::from_millis(5);
    home.reconnect.max = Duration::from_millis(20);
}

impl Life {
    fn status(&self) -> StreamStatus {
        self.board.stream(&energy()).status()
    }

    fn lost(&self, reason: DisconnectReason) -> u64 {
        self.board.stream(&energy()).meters.disconnected(reason).get()
    }

    /// What the node's judgement says of the stream.
    fn complaint(&self) -> Option<String> {
        let health = health::judge(&self.board);
        health.because.into_iter().find(|why| why.contains("stream energy"))
    }

    #[track_caller]
    fn assert_shown_as(&self, words: &str) {
        let complaint = self.complaint().expect("it is never shown as healthy");
        assert!(complaint.contains(words), "{complaint}");
    }
}

/// Every line logged on this thread while the guard lives.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Lines {
    fn listen() -> (Self, tracing::subscriber::DefaultGuard) {
        // A line that a test which does not listen logs first is off for all of them while there is only one subscriber
        // in the process: it alone is asked, on the thread of that test, where it does not count.
        static SECOND: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(NoSubscriber::new()));
        LazyLock::force(&SECOND);
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        (lines, tracing::subscriber::set_default(subscriber))
    }

    fn all(&self) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn with(&self, words: &str) -> Vec<String> {
        self.all().into_iter().filter(|line| line.contains(words)).collect()
    }
}

#[tokio::test]
async fn a_refused_subscription_is_never_healthy_and_taken_up_once_it_is_granted() {
    let (listener, settings) = scripted().await;
    let state = tempfile::tempdir().unwrap();
    let (lines, _guard) = Lines::listen();
    LocalSet::new()
        .run_until(async {
            let life = Life::begin(&settings, state.path());
            for refused in 1..=3 {
                let mut broker = Scripted::let_in(&listener).await;
                life.until("let in", |life| life.status().connected).await;
                life.assert_shown_as("is not subscribed");
                broker.answer(0x87).await;
                let counted = |life: &Life| life.lost(DisconnectReason::Refused) == refused;
                life.until("refused", counted).await;
                life.assert_shown_as("refused the subscription to \"a/#\"");
            }
            let mut broker = Scripted::let_in(&listener).await;
            broker.answer(1).await;
            life.subscribed().await;
            assert_eq!(life.complaint(), None);
            assert_eq!(lines.with("refused the subscription").len(), 1, "told once");
            life.stop().await;
        })
        .await;
}

#[tokio::test]
async fn a_broker_that_lets_in_and_never_grants_is_never_healthy() {
    let (listener, mut settings) = scripted().await;
    settings.brokers["home"].operation_timeout = Duration::from_millis(300);
    let state = tempfile::tempdir().unwrap();
    LocalSet::new()
        .run_until(async {
            let life = Life::begin(&settings, state.path());
            life.assert_shown_as("is not subscribed");
            for given_up in 1..=2 {
                let _silent = Scripted::let_in(&listener).await;
                life.until("let in", |life| {
                    life.assert_shown_as("is not subscribed");
                    life.status().connected
                })
                .await;
                life.until("given up", |life| {
                    life.assert_shown_as("is not subscribed");
                    life.lost(DisconnectReason::Network) == given_up
                })
                .await;
                life.assert_shown_as("did not answer within 0.3 s (SUBSCRIBE)");
            }
            life.stop().await;
        })
        .await;
}

#[tokio::test]
async fn a_broken_packet_is_told_once_and_counted_and_what_comes_after_is_kept() {
    /// A PUBLISH of QoS 3, which there is not.
    const BROKEN: [u8; 8] = [0x36, 6, 0, 1, b'a', 0, 1, 0];
    let (listener, settings) = scripted().await;
    let state = tempfile::tempdir().unwrap();
    let (lines, _guard) = Lines::listen();
    LocalSet::new()
        .run_until(async {
            let life = Life::begin(&settings, state.path());
            for broken in 1..=2 {
                let mut broker = Scripted::let_in(&listener).await;
                broker.answer(1).await;
                if broken == 1 {
                    life.subscribed().await;
                }
                broker.say(&BROKEN).await;
                let counted = |life: &Life| life.lost(DisconnectReason::Protocol) == broken;
                life.until("counted", counted).await;
                life.assert_shown_as("broke the MQTT protocol");
            }
            let rejected = life.board.stream(&energy()).meters.rejected_messages.get();
            assert_eq!(rejected, 2);
            let mut broker = Scripted::let_in(&listener).await;
            broker.answer(1).await;
            life.subscribed().await;
            broker.say(&[0x32, 9, 0, 3, b'a', b'/', b'b', 0, 7, 0, b'x']).await;
            life.kept(1).await;
            assert_eq!(all_payloads(&life.buffer), [b"x".to_vec()]);
            assert_eq!(life.complaint(), None);
            let told = lines.with("active=false");
            assert!(told.iter().all(|line| line.contains("stream-not-subscribed")), "{told:?}");
            assert_eq!(told.len(), 2, "{told:?}");
            life.stop().await;
        })
        .await;
}

/// Its port takes connections, as the kernel does for any program that stands still.
#[tokio::test]
async fn a_broker_that_never_answers_the_tls_handshake_is_given_up_in_time() {
    let (_listener, mut settings) = scripted().await;
    let home = settings.brokers.get_mut("home").unwrap();
    home.connect_timeout = Duration::from_millis(300);
    home.tls = Some(TlsSettings::default());
    let state = tempfile::tempdir().unwrap();
    LocalSet::new()
        .run_until(async {
            let life = Life::begin(&settings, state.path());
            for given_up in 1..=2 {
                let counted = |life: &Life| life.lost(DisconnectReason::Network) == given_up;
                life.until("given up", counted).await;
                life.assert_shown_as("did not answer within 0.3 s (connecting)");
            }
            life.stop().await;
        })
        .await;
}

#[tokio::test]
async fn a_stream_that_hears_nothing_from_its_start_on_is_shown_as_silent() {
    let broker = Mosquitto::start().unwrap();
    let state = tempfile::tempdir().unwrap();
    let mut settings = settings(broker.port());
    let limits = [200, 600].map(|millis| Some(Duration::from_millis(millis)));
    settings.streams[&energy()].silent_after = limits.into();
    LocalSet::new()
        .run_until(async {
            let life = Life::begin(&settings, state.path());
            life.subscribed().await;
            for severity in ["silent_warning_after_seconds", "silent_critical_after_seconds"] {
                let said = |life: &Life| life.complaint().is_some_and(|why| why.contains(severity));
                life.until(severity, said).await;
            }
            let publisher = publisher(broker.port());
            publisher.publish("energy", "a/b", "{}");
            life.kept(1).await;
            life.until("heard", |life| life.complaint().is_none()).await;
            life.stop().await;
        })
        .await;
}

#[tokio::test]
async fn a_lower_quality_of_service_is_told_once_and_messages_come() {
    let broker = Mosquitto::start_with(MosquittoOptions {
        extra: "max_qos 0".to_owned(),
        ..MosquittoOptions::default()
    });
    let mut broker = broker.unwrap();
    let state = tempfile::tempdir().unwrap();
    let mut settings = settings(broker.port());
    quick(&mut settings);
    let (lines, _guard) = Lines::listen();
    LocalSet::new()
        .run_until(async {
            let life = Life::begin(&settings, state.path());
            for sent in 1..=2 {
                life.subscribed().await;
                life.assert_shown_as("granted QoS 0, asked for 1");
                let publish = std::process::Command::new("mosquitto_pub")
                    .args(["-p", &broker.port().to_string(), "-t", "a/b", "-m", &format!("{sent}")])
                    .status();
                assert!(publish.unwrap().success());
                life.kept(sent).await;
                broker.stop().unwrap();
                life.until("lost", |life| !life.status().connected).await;
                broker.restart().unwrap();
            }
            life.subscribed().await;
            assert_eq!(all_payloads(&life.buffer), [b"1".to_vec(), b"2".to_vec()]);
            let told = lines.with("qos_lowered");
            assert_eq!(told.len(), 1, "{told:?}");
            assert!(
                told[0].contains("asked_qos=1") && told[0].contains("granted_qos=0"),
                "{told:?}"
            );
            life.stop().await;
        })
        .await;
}

#[tokio::test]
async fn two_nodes_with_one_client_id_both_say_so_and_do_not_fight() {
    const PAUSE: Duration = Duration::from_millis(500);
    const WATCHED: Duration = Duration::from_secs(4);
    let broker = Mosquitto::start().unwrap();
    let states = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut settings = settings(broker.port());
    let home = settings.brokers.get_mut("home").unwrap();
    home.reconnect.min = Duration::from_millis(5);
    home.reconnect.max = PAUSE;
    let (lines, _guard) = Lines::listen();
    LocalSet::new()
        .run_until(async {
            let [one, other] = states.each_ref().map(|state| Life::begin(&settings, state.path()));
            let taken_over = |life: &Life| life.lost(DisconnectReason::Takeover);
            for life in [&one, &other] {
                life.until("it yields", |life| taken_over(life) > 0).await;
                life.until("and says so", |life| {
                    !life.status().subscribed && life.trouble().contains("another client connect")
                })
                .await;
            }
            let both = || taken_over(&one) + taken_over(&other);
            let before = both();
            tokio::time::sleep(WATCHED).await;
            let times = both() - before;
            let most = WATCHED.as_millis() / PAUSE.as_millis() + 2;
            assert!(u128::from(times) <= most, "{times} takeovers within {WATCHED:?}");
            let told = lines.with("another client connect");
            assert_eq!(told.len() as u64, both(), "one line each time: {told:#?}");
            one.stop().await;
            other.stop().await;
        })
        .await;
}

/// MQTT 5 has a word for it, which Mosquitto does not use: there it is told from how soon the connection ends.
#[tokio::test]
async fn a_broker_that_says_who_took_the_session_is_believed_at_once() {
    const TAKEN_OVER: u8 = 0x8E;
    const PAUSE: Duration = Duration::from_secs(2);
    let (listener, mut settings) = scripted().await;
    settings.brokers["home"].reconnect.max = PAUSE;
    let state = tempfile::tempdir().unwrap();
    LocalSet::new()
        .run_until(async {
            let life = Life::begin(&settings, state.path());
            let mut broker = Scripted::let_in(&listener).await;
            broker.answer(1).await;
            life.until("subscribed", |life| life.status().subscribed).await;
            broker.say(&[DISCONNECT << 4, 2, TAKEN_OVER, 0]).await;
            life.until("it yields", |life| life.lost(DisconnectReason::Takeover) == 1).await;
            life.assert_shown_as("another client connected");
            let soon = timeout(PAUSE / 2, listener.accept()).await;
            assert!(soon.is_err(), "it takes the session back");
            life.stop().await;
        })
        .await;
}

/// As many trials as in ten minutes at the default pace: once in three seconds, of all streams together.
#[tokio::test]
async fn a_broker_that_refuses_for_as_long_as_ten_minutes_costs_a_few_lines_and_no_message() {
    const TRIALS: u64 = 200;
    let mut broker = Mosquitto::prepare(&MosquittoOptions::default()).unwrap();
    let state = tempfile::tempdir().unwrap();
    let mut settings = settings(broker.port());
    quick(&mut settings);
    let cool_down = Duration::from_millis(10);
    settings.brokers["home"].breaker = BreakerSettings { failures: 5, cool_down };
    let (lines, _guard) = Lines::listen();
    LocalSet::new()
        .run_until(async {
            let life = Life::begin(&settings, state.path());
            let refused = |life: &Life| life.lost(DisconnectReason::Network);
            life.until("refused often", |life| refused(life) >= TRIALS / 4).await;
            let early = lines.all().len();
            life.until("refused for long", |life| refused(life) >= TRIALS).await;
            life.assert_shown_as("refused the connection");
            let told = lines.all();
            assert_eq!(told.len(), early, "{told:#?}");
            assert!(told.len() < 5, "{told:#?}");
            assert!(!life.running.is_finished(), "the part itself goes on");
            broker.restart().unwrap();
            life.subscribed().await;
            assert_eq!(life.complaint(), None);
            let publisher = publisher(broker.port());
            publisher.publish("energy", "a/b", "{}");
            life.kept(1).await;
            life.stop().await;
        })
        .await;
}

/// Takes connections one after the other: reads what comes first, answers with `bytes` and hangs up.
async fn answering(listener: TcpListener, bytes: &'static [u8]) {
    while let Ok((mut tcp, _)) = listener.accept().await {
        // The node may hang up first.
        let _ = tcp.read(&mut [0; 4096]).await;
        let _ = tcp.write_all(bytes).await;
    }
}

#[tokio::test]
async fn only_what_a_person_must_mend_is_an_error_and_no_remedy_shows_the_password() {
    const HANDSHAKE: &str = "closed the connection during the TLS handshake";
    for (tls, answer, level, words) in [
        // A proxy or balancer whose broker is away.
        (true, &b""[..], "WARN", HANDSHAKE),
        (true, b"HTTP/1.1 400 Bad Request\r\n\r\n", "ERROR", "does not seem to speak TLS"),
        (false, &[0x20, 3, 0, 0x88, 0], "WARN", "unavailable or busy"),
        (false, &[0x20, 3, 0, 0x89, 0], "WARN", "unavailable or busy"),
        (false, &[0x20, 3, 0, 0x9F, 0], "WARN", "unavailable or busy"),
        (false, &[0x20, 3, 0, 0x86, 0], "ERROR", "password is wrong"),
    ] {
        let (listener, mut settings) = scripted().await;
        settings.brokers.get_mut("home").unwrap().tls = tls.then(TlsSettings::default);
        let state = tempfile::tempdir().unwrap();
        let (lines, _guard) = Lines::listen();
        LocalSet::new()
            .run_until(async {
                let broker = tokio::task::spawn_local(answering(listener, answer));
                let life = Life::begin(&settings, state.path());
                life.until("troubled", |life| !life.trouble().is_empty()).await;
                assert!(life.trouble().contains(words), "{}", life.trouble());
                assert!(!life.trouble().contains("remove"), "{}", life.trouble());
                life.until("told", |_| !lines.with("not receiving").is_empty()).await;
                let told = lines.with("not receiving");
                assert!(told[0].contains(level), "{words}: {told:?}");
                life.stop().await;
                broker.abort();
            })
            .await;
    }
}
