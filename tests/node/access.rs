//! Who may ask what over HTTP: tokens, scopes, limits, HTTPS.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use rig::{CertificateFiles, Certificates, Folder, eventually, request_as};
use serde_json::Value;
use telemetry::http::{Access, ROUTES, Scope};

use crate::world::{Changes, SOON, World};

/// Every request is answered, so polling in these tests must not meet the limit.
const UNLIMITED: &str = "requests_per_minute_max = 1000000\n";

fn guarded(http: &str) -> World {
    let extra = format!("[http]\nloopback_needs_token = true\n{http}");
    let mut world = World::prepare(Changes { http: extra, ..Changes::default() });
    world.node.start().unwrap();
    world
}

/// (id, text)
fn create(world: &World, scope: &str) -> (String, String) {
    let arguments = ["token", "create", "--scope", scope, "--expires", "1h", "--json"];
    let output = world.node.command(&arguments).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let made: Value = serde_json::from_slice(&output.stdout).unwrap();
    (made["id"].as_str().unwrap().to_owned(), made["token"].as_str().unwrap().to_owned())
}

fn status(world: &World, token: Option<&str>, method: &str, path: &str) -> u16 {
    request_as(world.node.http_port(), token, method, path, "{}").unwrap().status
}

/// What each route needs, written out: the table of the node is compared with it.
const EXPECTED: [(&str, &str, Option<&str>); 13] = [
    ("GET", "/health/live", None),
    ("GET", "/ping", None),
    ("GET", "/health/ready", None),
    ("GET", "/ready", None),
    ("GET", "/health", Some("read")),
    ("GET", "/metrics", Some("read")),
    ("GET", "/streams", Some("read")),
    ("GET", "/parts", Some("read")),
    ("POST", "/parts/{name:.*}/{order}", Some("operate")),
    ("POST", "/reload", Some("operate")),
    ("POST", "/dlq/list", Some("operate")),
    ("POST", "/dlq/replay", Some("operate")),
    ("POST", "/dlq/purge", Some("operate")),
];

/// 401 without a token that counts, 403 with one that is not enough, the route's own answer otherwise.
fn expected(needs: Option<&str>, has: Option<&str>) -> Option<u16> {
    match (needs, has) {
        (None, _)
        | (Some("read"), Some("read" | "operate"))
        | (Some("operate"), Some("operate")) => None,
        (Some(_), None) => Some(401),
        (Some(_), Some(_)) => Some(403),
    }
}

#[test]
fn every_route_asks_for_its_scope_and_no_other() {
    let needs = |access: Access| match access {
        Access::Anyone => None,
        Access::Token(Scope::Read) => Some("read"),
        Access::Token(Scope::Operate) => Some("operate"),
    };
    let table = ROUTES.map(|(method, path, access)| (method, path, needs(access)));
    assert_eq!(table, EXPECTED);

    let world = guarded(UNLIMITED);
    let (_, read) = create(&world, "read");
    let (_, operate) = create(&world, "operate");
    let (revoked_id, revoked) = create(&world, "operate");
    assert_eq!(status(&world, Some(&revoked), "GET", "/health"), 200);
    assert!(world.node.command(&["token", "revoke", &revoked_id]).unwrap().status.success());
    let callers = [
        (None, None),
        (Some("telemetry_guessed"), None),
        (Some(revoked.as_str()), None),
        (Some(read.as_str()), Some("read")),
        (Some(operate.as_str()), Some("operate")),
    ];
    let unknown = [("GET", "/nothing", Some("operate")), ("DELETE", "/health", Some("operate"))];
    for (method, pattern, needs) in EXPECTED.into_iter().chain(unknown) {
        let path = pattern.replace("{name:.*}/{order}", "stream:energy/resume");
        for (token, has) in callers {
            let answer = status(&world, token, method, &path);
            let asked = format!("{method} {path} needing {needs:?} as {has:?}: {answer}");
            match expected(needs, has) {
                Some(refused) => assert_eq!(answer, refused, "{asked}"),
                None => assert!(![401, 403, 429, 500].contains(&answer), "{asked}"),
            }
        }
    }
    let metrics = request_as(world.node.http_port(), Some(&read), "GET", "/metrics", "").unwrap();
    for reason in ["no_token", "wrong_token", "scope"] {
        let series = format!("telemetry_http_refused_requests_total{{reason=\"{reason}\"}} ");
        let mut lines = metrics.body.lines();
        let count = lines.find_map(|line| line.strip_prefix(&series)?.parse::<u64>().ok());
        assert!(count > Some(0), "{reason}: {}", metrics.body);
    }
    let log = world.node.log_text();
    for secret in [read, operate, revoked] {
        assert!(!log.contains(&secret), "a token is in the log");
    }
}

/// As after a copy of the wrong owner is put right: neither length nor time of the file changes with it.
#[test]
fn tokens_count_again_once_their_file_can_be_read_again() {
    let world = guarded(UNLIMITED);
    let (_, read) = create(&world, "read");
    let path = world.node.config().with_file_name("state").join("tokens.json");
    let changed = std::fs::metadata(&path).unwrap().modified().unwrap();
    let fill = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(changed).unwrap();
    };
    let good = std::fs::read(&path).unwrap();
    fill(&vec![b' '; good.len()]);
    for _ in 0..3 {
        assert_eq!(status(&world, Some(&read), "GET", "/streams"), 401);
    }
    fill(&good);
    assert_eq!(status(&world, Some(&read), "GET", "/streams"), 200);
    assert_eq!(world.node.log_text().matches("tokens_unreadable").count(), 1, "not per request");
}

#[test]
fn on_loopback_questions_are_free_and_orders_need_a_token() {
    let mut world = World::prepare(Changes::default());
    world.node.start().unwrap();
    let (_, read) = create(&world, "read");
    let (_, operate) = create(&world, "operate");
    assert_eq!(status(&world, None, "GET", "/streams"), 200);
    assert_eq!(status(&world, None, "POST", "/dlq/list"), 401);
    assert_eq!(status(&world, Some(&read), "POST", "/dlq/list"), 403);
    assert_eq!(status(&world, Some(&operate), "POST", "/dlq/list"), 200);
}

#[test]
fn who_has_no_token_learns_no_names() {
    let world = guarded(UNLIMITED);
    let port = world.node.http_port();
    let (_, read) = create(&world, "read");
    let anonymous = request_as(port, None, "GET", "/health/ready", "").unwrap();
    let known = request_as(port, Some(&read), "GET", "/health/ready", "").unwrap();
    assert!(!anonymous.body.contains("because"), "{}", anonymous.body);
    assert!(known.body.contains("because"), "{}", known.body);
    assert!(!anonymous.head.to_lowercase().contains("server:"), "{}", anonymous.head);
    // Whoever may open the socket needs no token.
    let shown = world.node.command(&["status"]).unwrap();
    assert!(String::from_utf8_lossy(&shown.stdout).contains("energy"));
}

#[test]
fn too_many_requests_are_told_when_to_come_again() {
    let world = guarded("requests_per_minute_max = 30\n");
    let port = world.node.http_port();
    let (_, read) = create(&world, "read");
    let mut answers =
        (0..40).map(|_| request_as(port, Some(&read), "GET", "/streams", "").unwrap());
    let refused = answers.find(|answer| answer.status != 200).expect("a limit");
    assert_eq!(refused.status, 429);
    let wait = refused.json().unwrap()["retry_after_seconds"].as_f64().unwrap();
    assert!((1.0..=2.0).contains(&wait), "{}", refused.body);
    assert!(refused.head.to_lowercase().contains("retry-after: "), "{}", refused.head);
    let (_, other) = create(&world, "read");
    assert_eq!(status(&world, Some(&other), "GET", "/streams"), 200, "each token has its own");
}

#[test]
fn a_body_has_a_bound_and_a_head_has_a_deadline() {
    let world = guarded(UNLIMITED);
    let port = world.node.http_port();
    let (_, operate) = create(&world, "operate");
    let large = " ".repeat(2 * 1024 * 1024);
    let answer = request_as(port, Some(&operate), "POST", "/dlq/list", &large);
    // The node may hang up before it has read all of it.
    assert!(answer.is_err() || answer.unwrap().status == 413);
    let mut slow = TcpStream::connect(("127.0.0.1", port)).unwrap();
    slow.set_read_timeout(Some(SOON)).unwrap();
    slow.write_all(b"GET /ping HTTP/1.1\r\nHost: x\r\n").unwrap();
    let mut answer = Vec::new();
    slow.read_to_end(&mut answer).expect("the node ends the connection");
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.is_empty() || answer.contains("408"), "{answer}");
}

#[test]
fn one_address_may_not_take_all_connections() {
    let world = guarded(&format!("{UNLIMITED}connections_per_peer_max = 8\n"));
    let port = world.node.http_port();
    let knock = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        // A connection that is closed at once may not even take the request.
        let _ = stream.write_all(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n");
        let mut answer = [0; 12];
        let answered = stream.read_exact(&mut answer).is_ok() && answer == *b"HTTP/1.1 200";
        answered.then_some(stream)
    };
    // What asked until the node was up may still be counted.
    let mut held = Vec::new();
    eventually(SOON, "eight places", || {
        held.extend(knock());
        held.len() == 8
    });
    assert!(knock().is_none(), "the ninth is let in");
    held.pop();
    eventually(SOON, "a place is given back with its connection", || knock().is_some());
    drop(held);
    let (_, read) = create(&world, "read");
    eventually(SOON, "the refusals are counted", || {
        let metrics = request_as(port, Some(&read), "GET", "/metrics", "");
        let counted = "\ntelemetry_http_refused_connections_total";
        let line = |body: &str| Some(body.split_once(counted)?.1.lines().next()?.to_owned());
        let count = |body: &str| line(body)?.split(' ').next_back()?.parse::<u64>().ok();
        metrics.is_ok_and(|metrics| count(&metrics.body).is_some_and(|count| count > 0))
    });
    assert_eq!(world.node.log_text().matches("http_crowded").count(), 1, "told once a minute");
}

#[test]
fn an_order_and_what_it_does_bear_one_id() {
    let world = guarded(UNLIMITED);
    let (_, operate) = create(&world, "operate");
    let mut stream = TcpStream::connect(("127.0.0.1", world.node.http_port())).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let request = format!(
        "POST /parts/stream:energy/pause HTTP/1.0\r\nAuthorization: Bearer {operate}\r\n\
         X-Correlation-ID: change-4711\r\nContent-Length: 0\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.to_lowercase().contains("x-correlation-id: change-4711\r\n"), "{answer}");
    assert_eq!(world.told("change-4711"), ["http_order", "part_ordered"]);
    let own = request_as(world.node.http_port(), None, "GET", "/ping", "").unwrap();
    assert!(own.head.to_lowercase().contains("x-correlation-id: "), "{}", own.head);
}

fn status_over_https(world: &World, files: &CertificateFiles, token: &std::path::Path) -> bool {
    let address = format!("127.0.0.1:{}", world.node.http_port());
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_telemetry"))
        .args(["status", "--json", "--address", &address, "--ca-file"])
        .arg(&files.authority)
        .arg("--token-file")
        .arg(token)
        .output()
        .unwrap();
    // 1 also stands for a node that is unhealthy; the answer is what counts.
    serde_json::from_slice::<Value>(&output.stdout).is_ok_and(|health| health["state"].is_string())
}

#[test]
fn https_away_from_loopback_with_a_renewed_certificate() {
    let folder = Folder::new(None, "https").unwrap();
    let first = Certificates::generate().unwrap().write(&folder.path().join("served")).unwrap();
    let old = folder.path().join("old.crt");
    std::fs::copy(&first.authority, &old).unwrap();
    let http = format!(
        "[http]\nlisten = \"0.0.0.0:{{port}}\"\n[http.tls]\ncertificate_file = {:?}\nkey_file = {:?}\n",
        first.server_certificate, first.server_key
    );
    let mut world = World::prepare(Changes { http, ..Changes::default() });
    world.node.spawn().unwrap();
    let token = folder.path().join("token");
    eventually(SOON, "a token can be made", || {
        let arguments = ["token", "create", "--scope", "read", "--expires", "1h"];
        let output = world.node.command(&arguments).unwrap();
        std::fs::write(&token, &output.stdout).unwrap();
        output.status.success()
    });
    eventually(SOON, "it answers over HTTPS", || status_over_https(&world, &first, &token));
    assert!(world.node.get("/ping").is_err(), "plain HTTP is not spoken");

    let second = Certificates::generate().unwrap().write(&folder.path().join("served")).unwrap();
    eventually(Duration::from_secs(10), "the renewed certificate is served", || {
        status_over_https(&world, &second, &token)
    });
    let old = CertificateFiles { authority: old, ..second };
    assert!(!status_over_https(&world, &old, &token), "the old authority counts no more");
}

#[test]
fn an_open_listener_without_tls_is_refused_with_78() {
    let http = "[http]\nlisten = \"0.0.0.0:{port}\"\n".to_owned();
    let world = World::prepare(Changes { http, ..Changes::default() });
    let output = world.node.command(&["run"]).unwrap();
    assert_eq!(output.status.code(), Some(78));
    let report = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(report.contains("[http.tls]") && report.contains("clear_text_allowed"), "{report}");
}

#[test]
fn a_certificate_that_does_not_fit_its_key_is_a_mistake_of_the_configuration() {
    let folder = Folder::new(None, "https").unwrap();
    let one = Certificates::generate().unwrap().write(&folder.path().join("one")).unwrap();
    let other = Certificates::generate().unwrap().write(&folder.path().join("other")).unwrap();
    let http = format!(
        "[http.tls]\ncertificate_file = {:?}\nkey_file = {:?}\n",
        one.server_certificate, other.server_key
    );
    let world = World::prepare(Changes { http, ..Changes::default() });
    let output = world.node.command(&["check"]).unwrap();
    assert_eq!(output.status.code(), Some(78));
    assert!(String::from_utf8_lossy(&output.stderr).contains("do not fit"));
}
