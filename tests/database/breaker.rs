//! The breaker that all writers of one database share, against a server that takes connections and says nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rig::{Link, PASSWORD, Proxy};
use telemetry::breaker::BreakerState;
use telemetry::database::{DatabaseError, Pool, TableSink};
use telemetry::domain::ErrorClass;
use telemetry::observe::{DependencyStatus, SinkState};
use tokio::net::{TcpListener, TcpStream};

use crate::bench::{Bench, at, energies, energy, eventually, local};
use crate::outages::session;

const COOL_DOWN: Duration = Duration::from_secs(1);
/// No partition is made beforehand for it.
const FAR_AHEAD_MICROS: i64 = 1_000 * 86_400_000_000;

/// Takes connections; once told to, leads them to the server.
struct Door {
    port: u16,
    open: Arc<AtomicBool>,
    knocks: Arc<AtomicUsize>,
    /// Connections held at one time.
    most: Arc<AtomicUsize>,
}

impl Door {
    async fn before(target: u16) -> Door {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let door = Door {
            port: listener.local_addr().unwrap().port(),
            open: Arc::default(),
            knocks: Arc::default(),
            most: Arc::default(),
        };
        let (open, knocks, most) = (door.open.clone(), door.knocks.clone(), door.most.clone());
        tokio::task::spawn_local(async move {
            let now = Arc::new(AtomicUsize::new(0));
            while let Ok((near, _)) = listener.accept().await {
                knocks.fetch_add(1, Ordering::Relaxed);
                let (open, now, most) = (open.clone(), now.clone(), most.clone());
                tokio::task::spawn_local(async move {
                    most.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                    lead(near, &open, target).await;
                    now.fetch_sub(1, Ordering::Relaxed);
                });
            }
        });
        door
    }

    fn knocks(&self) -> usize {
        self.knocks.load(Ordering::Relaxed)
    }
}

async fn lead(mut near: TcpStream, open: &AtomicBool, target: u16) {
    if open.load(Ordering::Relaxed) {
        let mut far = TcpStream::connect(("127.0.0.1", target)).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
        return;
    }
    // Says nothing until the other side has had enough.
    let (mut reader, _writer) = near.split();
    let _ = tokio::io::copy(&mut reader, &mut tokio::io::sink()).await;
}

/// Three writers of one database, over one pool.
fn writers(bench: &Bench) -> Vec<TableSink> {
    let database = &bench.settings.databases["telemetry"];
    let pool = Pool::new(database, bench.dependency("telemetry"));
    [
        ("energy", "energy_consumption"),
        ("temperature_outdoor", "temperature_sensors"),
        ("temperature_indoor", "temperature_sensors"),
    ]
    .map(|(stream, table)| TableSink { pool: pool.clone(), ..bench.sink(stream, table) })
    .into()
}

#[test]
fn writers_of_a_silent_database_stop_asking_try_one_at_a_time_and_go_on_together() {
    local(async {
        let mut bench = Bench::with(|settings| {
            settings.databases["telemetry"].breaker.cool_down = COOL_DOWN;
        })
        .await;
        let door = Door::before(bench.cluster.port()).await;
        let database = &mut bench.settings.databases["telemetry"];
        database.port = door.port;
        database.connect_timeout = Duration::from_millis(200);
        // Slower than the cool-down: above the trip the breaker is the pace.
        database.retry.max = Duration::from_secs(30);
        bench.feed("energy", energies(100)).await;
        let running: Vec<_> = writers(&bench).into_iter().map(|sink| bench.run(sink)).collect();
        let dependency = bench.dependency("telemetry");
        let breaker = || dependency.status().breaker;
        eventually("it opens: timeouts count", || breaker().state == BreakerState::Open).await;
        assert_eq!(breaker().trips, 1);
        assert!(breaker().next_trial.is_some());
        assert!(dependency.status().trouble.unwrap().contains("no answer within"));
        for writer in &running {
            writer.reaches(SinkState::Waiting).await;
        }

        let (before, begun) = (door.knocks(), Instant::now());
        door.most.store(0, Ordering::Relaxed);
        eventually("three more trials", || door.knocks() >= before + 3).await;
        assert_eq!(door.most.load(Ordering::Relaxed), 1, "one trial at a time");
        // The first of the three may have been about to begin.
        assert!(begun.elapsed() >= COOL_DOWN * 2, "each failed trial starts a new cool-down");
        assert_eq!(breaker().trips, 1, "a failed trial is no trip");

        door.open.store(true, Ordering::Relaxed);
        let opened = Instant::now();
        eventually("every writer is back", || {
            running.iter().all(|writer| writer.status().state == SinkState::Delivering)
        })
        .await;
        // Their own back-off is three times this; a busy machine takes its time.
        assert!(opened.elapsed() < COOL_DOWN * 10, "{:?}", opened.elapsed());
        assert_eq!(running[0].drained().await.delivered, 100);
        let DependencyStatus { up, breaker, .. } = dependency.status();
        assert_eq!((up, breaker.state, breaker.trips), (Some(true), BreakerState::Closed, 1));
        for writer in running {
            writer.stop().await;
        }
    });
}

/// A bench whose server never ends a statement by itself, which would be an answer, and whose breaker opens at once.
async fn without_an_end() -> (Bench, Proxy) {
    let mut bench = Bench::with(|settings| {
        let breaker = &mut settings.databases["telemetry"].breaker;
        (breaker.failures, breaker.cool_down) = (1, Duration::from_secs(3600));
    })
    .await;
    let proxy = Proxy::start(bench.cluster.port()).unwrap();
    proxy.set(Link::Replacing(b"statement_timeout = 300", b"statement_timeout = 000"));
    let database = &mut bench.settings.databases["telemetry"];
    (database.port, database.statement_timeout) = (proxy.port(), Duration::from_millis(300));
    bench.feed("energy", energies(10)).await;
    (bench, proxy)
}

/// It takes connections and answers small questions: only what is asked of it with rows is never answered.
#[test]
fn a_transaction_that_is_never_answered_counts() {
    local(async {
        let (bench, _proxy) = without_an_end().await;
        let running = bench.start("energy", "energy_consumption");
        running.drained().await;
        let lock = session(&bench).await;
        lock.batch_execute("BEGIN; LOCK TABLE telemetry.energy_consumption").await.unwrap();
        bench.feed("energy", energies(10)).await;
        counts(&bench, "write a batch: no answer within").await;
        running.stop().await;
        lock.batch_execute("ROLLBACK").await.unwrap();
    });
}

#[test]
fn a_first_question_that_is_never_answered_counts() {
    local(async {
        let (bench, _proxy) = without_an_end().await;
        let lock = session(&bench).await;
        lock.batch_execute("BEGIN; LOCK TABLE telemetry.telemetry_cursors").await.unwrap();
        let running = bench.start("energy", "energy_consumption");
        counts(&bench, "read the cursor: no answer within").await;
        running.stop().await;
        lock.batch_execute("ROLLBACK").await.unwrap();
    });
}

#[test]
fn partitions_whose_making_is_never_answered_count() {
    local(async {
        let (bench, _proxy) = without_an_end().await;
        let running = bench.start("energy", "energy_consumption");
        running.drained().await;
        let lock = session(&bench).await;
        // Rows can be written, and no partition attached.
        let lock_table =
            "BEGIN; LOCK TABLE telemetry.energy_consumption IN SHARE UPDATE EXCLUSIVE MODE";
        lock.batch_execute(lock_table).await.unwrap();
        bench.feed("energy", vec![energy(1, at(FAR_AHEAD_MICROS))]).await;
        counts(&bench, "make partitions: no answer within").await;
        running.stop().await;
        lock.batch_execute("ROLLBACK").await.unwrap();
    });
}

async fn counts(bench: &Bench, words: &str) {
    let dependency = bench.dependency("telemetry");
    let open = || dependency.status().breaker.state == BreakerState::Open;
    eventually("the breaker opens", open).await;
    let trouble = dependency.status().trouble.unwrap();
    assert!(trouble.contains(words), "{trouble}");
}

#[test]
fn a_locked_table_is_its_own_writers_trouble_alone() {
    local(async {
        let bench = Bench::with(|settings| {
            let database = &mut settings.databases["telemetry"];
            database.statement_timeout = Duration::from_millis(200);
            database.breaker.failures = 2;
            database.breaker.cool_down = Duration::from_secs(3600);
        })
        .await;
        let sinks = writers(&bench);
        let running: Vec<_> = sinks.into_iter().map(|sink| bench.run(sink)).collect();
        for writer in &running {
            writer.reaches(SinkState::Delivering).await;
        }
        let lock = session(&bench).await;
        lock.batch_execute("BEGIN; LOCK TABLE telemetry.energy_consumption").await.unwrap();
        bench.feed("energy", energies(10)).await;
        let trouble = running[0].reaches(SinkState::Waiting).await.trouble.unwrap();
        assert!(trouble.contains("57014"), "{trouble}");
        let retries = || running[0].sink.view().meters.retries.get();
        eventually("it has tried more often than the breaker allows", || retries() > 4).await;
        assert_eq!(bench.dependency("telemetry").status().breaker.state, BreakerState::Closed);
        assert_eq!(bench.dependency("telemetry").status().up, Some(true));
        lock.batch_execute("ROLLBACK").await.unwrap();
        assert_eq!(running[0].drained().await.delivered, 10);
        for writer in running {
            writer.stop().await;
        }
    });
}

/// Whoever borrows waits only this long for a connection, of which there is one.
async fn with_one_connection() -> (Bench, Door) {
    let mut bench = Bench::new().await;
    let door = Door::before(bench.cluster.port()).await;
    let database = &mut bench.settings.databases["telemetry"];
    (database.port, database.connections_max) = (door.port, 1);
    database.pool_timeout = Duration::from_millis(300);
    (bench, door)
}

fn pool_of(bench: &Bench) -> Pool {
    Pool::new(&bench.settings.databases["telemetry"], bench.dependency("telemetry"))
}

#[test]
fn a_connection_that_others_use_is_waited_for_and_old_failures_are_not_to_blame() {
    local(async {
        let (mut bench, door) = with_one_connection().await;
        let database = &mut bench.settings.databases["telemetry"];
        database.connect_timeout = Duration::from_secs(1);
        database.pool_timeout = Duration::from_millis(1500);
        let pool = pool_of(&bench);
        let cause = pool.get().await.err().expect("silent").to_string();
        assert!(cause.contains("no answer within 1 s"), "{cause}");
        door.open.store(true, Ordering::Relaxed);
        let lent = pool.get().await.unwrap();
        let one = || async { pool.get().await.err().expect("all are lent") };
        // As many as open the breaker.
        let (a, b, c, d, e) = tokio::join!(one(), one(), one(), one(), one());
        for error in [a, b, c, d, e] {
            assert!(matches!(error, DatabaseError::PoolTimedOut { .. }), "{error}");
        }
        let breaker = bench.dependency("telemetry").status().breaker;
        assert_eq!(breaker.state, BreakerState::Closed);
        lent.give_back();
        pool.get().await.unwrap();
    });
}

#[test]
fn a_server_that_gives_fewer_connections_than_the_pool_may_have_is_named_to_who_waits() {
    local(async {
        let mut bench = Bench::new().await;
        bench.cluster.create_role("one_at_a_time", PASSWORD).unwrap();
        bench.cluster.execute("postgres", "ALTER ROLE one_at_a_time CONNECTION LIMIT 1").unwrap();
        let database = &mut bench.settings.databases["telemetry"];
        database.user = "one_at_a_time".to_owned();
        database.connections_max = 2;
        database.pool_timeout = Duration::from_millis(500);
        let pool = pool_of(&bench);
        let lent = pool.get().await.unwrap();
        let error = pool.get().await.err().expect("there is no second one");
        let text = error.to_string();
        assert!(text.contains("53300") && !text.contains("connections_max"), "{text}");
        assert!(error.class() == ErrorClass::Transient && !error.is_connection_trouble());
        lent.give_back();
        pool.get().await.unwrap();
    });
}

#[test]
fn who_waits_less_long_than_connecting_may_take_is_not_told_of_too_few_connections() {
    local(async {
        let (bench, _door) = with_one_connection().await;
        let error = pool_of(&bench).get().await.err().expect("silent");
        assert!(error.is_connection_trouble(), "{error}");
        assert_eq!(error.to_string(), "connect to the database: no answer within 0.3 s");
    });
}
