//! The least that anyone would have to do: what the node's figures are divided by.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::SinkExt;
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use rdkafka::{ClientContext, Message};
use rig::{Mqtt, MqttOptions, Record};
use rumqttc::v5::mqttbytes::v5::{Packet, PubAck};
use tokio_postgres::NoTls;

use crate::load::FIRST;

/// As the node's default: the broker's work depends on it.
const RECEIVE_MAXIMUM: u16 = 4_096;

/// A subscriber that acknowledges at once and keeps nothing.
pub struct Subscriber(JoinHandle<Result<Instant>>);

impl Subscriber {
    /// Subscribes; returns when the broker has granted it. It ends after `count` messages.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn start(port: u16, topic: &str, count: u64) -> Result<Self> {
        let topic = topic.to_owned();
        let (ready, subscribed) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let mut options = MqttOptions::new(port, "bare");
                options.receive_maximum = RECEIVE_MAXIMUM;
                let mut mqtt = Mqtt::connect(&options).await?;
                mqtt.subscribe(&topic).await?;
                let _ = ready.send(());
                acknowledge(&mut mqtt, count).await?;
                Ok(Instant::now())
            })
        });
        if subscribed.recv().is_err() {
            let outcome = thread.join().map_err(|_| anyhow!("the subscriber panicked"))?;
            return Err(outcome.err().unwrap_or_else(|| anyhow!("the subscriber ended")));
        }
        Ok(Self(thread))
    }

    /// When the last message had come.
    ///
    /// # Errors
    /// When the connection was lost.
    pub fn join(self) -> Result<Instant> {
        self.0.join().map_err(|_| anyhow!("the subscriber panicked"))?
    }
}

async fn acknowledge(mqtt: &mut Mqtt, count: u64) -> Result<()> {
    let mut received = 0;
    let mut answers = BytesMut::new();
    while received < count {
        while let Some(packet) = mqtt.take()? {
            if let Packet::Publish(message) = packet {
                PubAck::new(message.pkid, None).write(&mut answers).context("encode")?;
                received += 1;
            }
        }
        if answers.is_empty() {
            mqtt.fill().await?;
        } else {
            mqtt.write(&answers).await?;
            answers.clear();
        }
    }
    Ok(())
}

const COPY: &str = "COPY energy_consumption (time, device_serial, meter_type, wifi_rssi, \
    active_power_total, active_power_l1, active_power_l2, active_power_l3, \
    active_production_total, active_energy_total, active_energy_production, voltage_l1, \
    voltage_l2, voltage_l3, current_l1, current_l2, current_l3, power_factor) \
    FROM STDIN (FORMAT binary)";
const COPY_HEAD: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
const COPY_END: [u8; 2] = [0xff, 0xff];

/// Copies ready-made energy rows over one connection, a transaction per batch; gives rows per second.
///
/// # Errors
/// When the server refuses.
pub fn copy(target: &str, rows: u64, batch: u64) -> Result<f64> {
    let target = target.to_owned();
    rig::block_on(async move {
        let (mut client, connection) = tokio_postgres::connect(&target, NoTls).await?;
        let driver = tokio::spawn(connection);
        let batches: Vec<Bytes> = (0..rows)
            .step_by(usize::try_from(batch).context("a batch fits memory")?)
            .map(|first| ready_made(first..rows.min(first + batch)))
            .collect();
        let started = Instant::now();
        for rows in batches {
            let transaction = client.transaction().await?;
            let sink = transaction.copy_in::<_, Bytes>(COPY).await?;
            let mut sink = std::pin::pin!(sink);
            sink.send(rows).await?;
            sink.as_mut().finish().await?;
            transaction.commit().await?;
        }
        let rate = rows as f64 / started.elapsed().as_secs_f64();
        driver.abort();
        Ok(rate)
    })
}

/// Microseconds from 1970 to 2000, where PostgreSQL's clock begins.
const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;

fn ready_made(counters: std::ops::Range<u64>) -> Bytes {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as i64 - POSTGRES_EPOCH_MICROS);
    let mut bytes = BytesMut::new();
    bytes.put_slice(COPY_HEAD);
    for counter in counters {
        bytes.put_i16(18);
        put(&mut bytes, &(now + counter as i64).to_be_bytes());
        put(&mut bytes, b"SE-4471-K");
        put(&mut bytes, b"three-phase");
        put(&mut bytes, &(-41_i16).to_be_bytes());
        for value in [1284_i32, 612, 389, 283, 0] {
            put(&mut bytes, &value.to_be_bytes());
        }
        for value in [(FIRST + counter) as i64, 83] {
            put(&mut bytes, &value.to_be_bytes());
        }
        for value in [237_i16, 238, 236] {
            put(&mut bytes, &value.to_be_bytes());
        }
        for value in [2583_i32, 1634, 1199] {
            put(&mut bytes, &value.to_be_bytes());
        }
        put(&mut bytes, &98_i16.to_be_bytes());
    }
    bytes.put_slice(&COPY_END);
    bytes.freeze()
}

fn put(bytes: &mut BytesMut, value: &[u8]) {
    bytes.put_i32(value.len() as i32);
    bytes.put_slice(value);
}

/// Counts what was delivered.
struct Delivered(Arc<AtomicU64>);

impl ClientContext for Delivered {}

impl ProducerContext for Delivered {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Ok(message) = result {
            debug_assert!(message.offset() >= 0);
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// librdkafka's answer when its queue is full.
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(1);
const FLUSH_WITHIN: Duration = Duration::from_secs(120);

/// Sends ready-made records, over and over, with the node's producer settings; gives records per second.
///
/// # Errors
/// When one is not delivered.
pub fn produce(bootstrap: &str, topic: &str, ready: &[Record], count: u64) -> Result<f64> {
    let delivered = Arc::new(AtomicU64::new(0));
    let producer: ThreadedProducer<Delivered> = ClientConfig::new()
        .set("bootstrap.servers", bootstrap)
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("compression.type", "snappy")
        .set("linger.ms", "5")
        .set("batch.size", (128 * 1024).to_string())
        .set("socket.nagle.disable", "true")
        .set("partitioner", "murmur2_random")
        .create_with_context(Delivered(delivered.clone()))?;
    // The node is measured from its first delivery on, so what comes before does not count here either.
    send(&producer, topic, ready.first().context("a ready-made record")?)?;
    producer.flush(FLUSH_WITHIN)?;
    let started = Instant::now();
    for record in ready.iter().cycle().take(usize::try_from(count - 1).context("a count")?) {
        send(&producer, topic, record)?;
    }
    producer.flush(FLUSH_WITHIN)?;
    let rate = (count - 1) as f64 / started.elapsed().as_secs_f64();
    let arrived = delivered.load(Ordering::Relaxed);
    anyhow::ensure!(arrived == count, "{arrived} of {count} records delivered");
    Ok(rate)
}

fn send(producer: &ThreadedProducer<Delivered>, topic: &str, record: &Record) -> Result<()> {
    let (name, value) = record.headers.first().context("a record with its header")?;
    let headers = OwnedHeaders::new().insert(Header { key: name, value: Some(value) });
    let key = record.key.as_deref().unwrap_or_default();
    let mut next = BaseRecord::to(topic).key(key).payload(&record.value[..]).headers(headers);
    while let Err((error, back)) = producer.send(next) {
        if error != KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull) {
            return Err(error).context("send a record");
        }
        std::thread::sleep(QUEUE_FULL_PAUSE);
        next = back;
    }
    Ok(())
}

/// The baselines are tried alone, since a wrong one would make every figure of the node wrong.
#[cfg(test)]
mod tests {
    use rig::{Kafka, Mosquitto, MosquittoOptions, Postgres};

    use super::*;
    use crate::load::{flood, payload};

    #[test]
    fn the_bare_subscriber_takes_everything_the_load_publishes() {
        let broker = Mosquitto::start_with(MosquittoOptions {
            autosave_on_changes: false,
            ..MosquittoOptions::default()
        })
        .unwrap();
        let subscriber = Subscriber::start(broker.port(), "t", 10_000).unwrap();
        flood(broker.port(), "t", 10_000).join().unwrap();
        subscriber.join().unwrap();
    }

    #[test]
    fn the_bare_copy_writes_every_row_with_its_values() {
        let server = Postgres::start().unwrap();
        let columns = "time timestamptz, device_serial text, meter_type text, wifi_rssi int2, \
            active_power_total int4, active_power_l1 int4, active_power_l2 int4, \
            active_power_l3 int4, active_production_total int4, active_energy_total int8, \
            active_energy_production int8, voltage_l1 int2, voltage_l2 int2, voltage_l3 int2, \
            current_l1 int4, current_l2 int4, current_l3 int4, power_factor int2";
        server
            .execute("postgres", &format!("CREATE TABLE energy_consumption ({columns})"))
            .unwrap();
        let rate = copy(&server.connection_string("postgres"), 2_500, 1_000).unwrap();
        assert!(rate > 0.0);
        let odd = "energy_consumption WHERE voltage_l2 <> 238 OR meter_type <> 'three-phase' \
            OR power_factor <> 98 OR time < now() - interval '1 minute'";
        assert_eq!(server.count("postgres", odd).unwrap(), 0);
        let last =
            server.value("postgres", "SELECT max(active_energy_total) FROM energy_consumption");
        assert_eq!(last.unwrap(), (FIRST + 2_499).to_string());
    }

    #[test]
    fn the_bare_producer_delivers_what_it_counts() {
        let broker = Kafka::start().unwrap();
        broker.create_topic("t", 1).unwrap();
        let ready = [Record {
            key: Some(b"k".to_vec()),
            value: payload(FIRST).into_bytes(),
            headers: vec![("telemetry-id".into(), b"x/y/1".to_vec())],
            timestamp: None,
            partition: 0,
            offset: 0,
        }];
        assert!(produce(&broker.bootstrap(), "t", &ready, 5_000).unwrap() > 0.0);
        assert_eq!(broker.count("t").unwrap(), 5_000);
        assert_eq!(broker.read_first("t", 10).unwrap().len(), 10);
    }
}
