//! Every event of the log, as `docs/logs.md` explains it. Level, fields and runbook stand where the event is told; a
//! test reads them there, and refuses an event that is not explained here, or explained and never told.

/// Events that belong together for whoever reads them.
#[derive(Debug)]
pub struct Chapter {
    pub title: &'static str,
    pub events: &'static [Event],
}

/// One event: the value of the field `event`.
#[derive(Debug)]
pub struct Event {
    pub name: &'static str,
    pub meaning: &'static str,
    /// What a person does about it; empty: nothing.
    pub remedy: &'static str,
}

const fn event(name: &'static str, meaning: &'static str, remedy: &'static str) -> Event {
    Event { name, meaning, remedy }
}

pub const CHAPTERS: [Chapter; 9] = [
    Chapter {
        title: "Start and stop",
        events: &[
            event(
                "configuration_warning",
                "A setting is taken, and hardly meant",
                "Change it as the line says",
            ),
            event(
                "configuration_reloaded",
                "A reload took the changed configuration; which parts were added, renewed or removed",
                "",
            ),
            event(
                "configuration_refused",
                "A reload met a mistake; the old configuration goes on",
                "Correct what the line names, `telemetry check`, reload again",
            ),
            event(
                "restart_needed",
                "These changed settings count from the next start on",
                "`systemctl restart telemetry` when it suits",
            ),
            event("buffer_opened", "The buffer is open, with this many generations and bytes", ""),
            event("node_started", "Streams may accept; everything outside may still be away", ""),
            event(
                "node_stopping",
                "A stop was asked for: intake has ended, sinks deliver what they can",
                "",
            ),
            event(
                "drain_deadline",
                "`node.drain_timeout_seconds` are over; what these parts have pending waits in the buffer",
                "",
            ),
            event("node_stopping_at_once", "A second signal ended the drain", ""),
            event(
                "parts_left",
                "These parts did not end in time and were left behind; nothing is lost",
                "Report it, with the lines before",
            ),
            event(
                "buffer_close_failed",
                "The buffer did not close cleanly; the next start recovers it",
                "Look after the disk when the error is one of its",
            ),
            event("node_stopped", "The process ends with exit code 0", ""),
            event(
                "clock_jumped",
                "The wall clock was set",
                "See to the time service when nobody did it on purpose",
            ),
        ],
    },
    Chapter {
        title: "Parts",
        events: &[
            event(
                "part_failed",
                "A part ended with an error or a panic and is started afresh",
                "None when it stays alone; the error says what it met",
            ),
            event(
                "part_parked",
                "A part failed too often; the others go on, and it is tried again later",
                "Mend what the error names, then `telemetry parts restart`",
            ),
            event(
                "part_stalled",
                "A part had work and made no progress, or its thread stood still; it is ended and started afresh",
                "None when it stays alone; else find out what it waits for",
            ),
            event(
                "supervisor_gone",
                "A defect of the node: who looks after the parts has panicked, so the node ends and is started afresh",
                "Report it, with the lines before",
            ),
            event("part_ordered", "A person restarted, paused or resumed a part", ""),
            event(
                "panic",
                "A defect of the node: the part concerned is started afresh",
                "Report it, with the line",
            ),
        ],
    },
    Chapter {
        title: "Streams",
        events: &[
            event(
                "stream_input_active",
                "`active=true`: subscribed, messages may come. `active=false`: why not; an error is one that does not mend itself",
                "For an error: correct user, password, access list or certificate",
            ),
            event(
                "session_new",
                "The broker had no session for a stream that had one",
                "Check the broker's persistence and session expiry",
            ),
            event(
                "qos_lowered",
                "The broker grants less than the stream asks for; what is under way at a crash is lost",
                "Raise it in the broker's configuration",
            ),
            event(
                "stream_silent",
                "Subscribed, and no message for longer than `silent_warning_after_seconds` or `silent_critical_after_seconds`",
                "Look after the devices",
            ),
            event("stream_heard", "A silent stream has messages again", ""),
        ],
    },
    Chapter {
        title: "Buffer",
        events: &[
            event(
                "buffer_filling",
                "80 or 95 % of the quota are used: a sink is away or too slow",
                "Bring it back, or raise `buffer.quota_bytes`",
            ),
            event(
                "buffer_full",
                "Nothing is acknowledged any more; the broker keeps what comes",
                "Bring the sinks back, or make room on the disk",
            ),
            event("buffer_accepting", "There is room again", ""),
            event(
                "records_lost",
                "The disk lost kept records; which ones, and how many",
                "Look after the disk; acknowledge the loss",
            ),
            event(
                "generation_unfinished",
                "The node ended while it made a generation; the empty folder is removed",
                "",
            ),
            event(
                "generation_harmed",
                "The disk lost a part of a generation; the rest is delivered, then its folder is set aside",
                "Look after the disk: `records_lost` names what is gone",
            ),
            event(
                "sink_passed_lost_records",
                "A Kafka sink met records that the buffer could not read, and went past them",
                "As for `records_lost`",
            ),
            event(
                "buffer_quarantined",
                "A part of the buffer is unreadable and was set aside",
                "Keep it for a repair, or remove it",
            ),
            event(
                "marks_damaged",
                "The file of the buffer's positions is unreadable; they are found from the records",
                "Look after the disk",
            ),
            event(
                "reached_damaged",
                "The file that tells how far each stream was acknowledged is unreadable; the records tell it",
                "Look after the disk",
            ),
            event(
                "letters_damaged",
                "A part of the file that tells which dead letters there are is unreadable; the database tells it, and it is made anew",
                "Look after the disk",
            ),
            event(
                "identity_damaged",
                "The file that names the log is unreadable",
                "Look after the disk; `identity_restored` follows",
            ),
            event(
                "identity_restored",
                "The name of the log was found in the records, and its file made again",
                "Look after the disk, or who removed the file",
            ),
            event(
                "generation_misplaced",
                "A part of the buffer stands in another one's place, and is put right",
                "Find out who moved or restored it",
            ),
            event(
                "read_failed",
                "A part of the buffer could not be read, and is read again",
                "Look after the disk",
            ),
            event(
                "state_missing",
                "The database of books, dead letters and Kafka cursors is gone, though the log is there",
                "Put it back if it exists elsewhere",
            ),
            event(
                "dead_letters_salvaged",
                "Dead letters were found in the bytes of the harmed state database and kept",
                "Look after the disk",
            ),
            event(
                "dead_letters_put_back",
                "The node was killed while it kept dead letters; those that had come to the disk are kept",
                "",
            ),
            event(
                "dead_letters_hidden",
                "Dead letters stand in the state database where they are not found, and there is no room to put them back",
                "Free space, and start the node again",
            ),
            event(
                "dead_letters_lost",
                "The disk lost dead letters; which ones",
                "Look after the disk",
            ),
            event(
                "log_replaced",
                "The log is gone, though its state is there; a new one began",
                "Put it back if it exists elsewhere",
            ),
            event(
                "buffer_failed",
                "The disk refused a write or a sync, or a read by which a database is opened: the node ends and is started afresh",
                "Look after the disk when it comes again",
            ),
            event(
                "buffer_stalled",
                "A thread of the buffer has work and makes no progress, as over a write that does not return; systemd's watchdog ends the process",
                "Look after the disk; a process that waits for it ends only when it answers",
            ),
            event("buffer_moves", "The disk answers again", ""),
            event(
                "ballast_released",
                "The disk was full at the start: the reserve was given up so that the buffer could open",
                "Make room on the disk",
            ),
            event("ballast_not_written", "There is no room for the reserve", ""),
            event(
                "generation_dropped",
                "Every sink has passed these records: their space is free again",
                "",
            ),
            event(
                "stream_not_configured",
                "The buffer holds records of a stream that is not configured",
                "Configure it again, or leave them: they cost only their space",
            ),
        ],
    },
    Chapter {
        title: "Outside: brokers, clusters, databases",
        events: &[
            event(
                "dependency_lost",
                "It does not answer; it is tried again, quietly",
                "None, if it comes back",
            ),
            event(
                "breaker_opened",
                "It failed several times in a row: one trial at a time from now on",
                "None, if it comes back",
            ),
            event(
                "dependency_reached",
                "It answers; after an outage with how long it took and how many attempts failed",
                "",
            ),
            event(
                "kafka_library",
                "A warning of the Kafka client, each kind once per outage",
                "It often names the cause of a `dependency_lost` beside it",
            ),
            event(
                "kafka_producer_deaf",
                "The cluster answers, but not this producer, which is replaced; what was on its way may come twice",
                "None, after a restart of the brokers",
            ),
            event("kafka_topic_created", "`ensure` made a topic", ""),
            event(
                "kafka_topic_drift",
                "A topic is not as `ensure` asks for; it is left as it is",
                "Change the topic, or `ensure`",
            ),
            event(
                "kafka_batches_too_large",
                "The topic takes no batch of `batch_bytes`; records go one by one",
                "Lower `batch_bytes`, or raise the topic's `max.message.bytes`",
            ),
            event(
                "kafka_callback_panicked",
                "What the Kafka client told was lost to a defect; for a delivery report its stream sends again from its cursor",
                "Report it, with the panic before it",
            ),
        ],
    },
    Chapter {
        title: "Sinks and dead letters",
        events: &[
            event(
                "sink_waiting",
                "A batch failed for a reason that passes by itself; it is tried again",
                "None, if it stays alone",
            ),
            event(
                "sink_held",
                "A sink cannot go on until something is mended; its stream is kept",
                "Mend what the error names",
            ),
            event("sink_released", "A held sink delivers again", ""),
            event("sink_state", "The state of a Kafka sink changed", ""),
            event(
                "sink_fenced",
                "Another node writes this sink: this one has stopped doing so",
                "Stop one of the two, then restart the part",
            ),
            event(
                "books_do_not_balance",
                "Received is not the sum of what became of it; `difference` is what is missing",
                "As its page says: it is evidence of an edited bookkeeping row, or of a mistake here",
            ),
            event("books_balance", "The books of a sink balance again", ""),
            event(
                "database_went_back",
                "The database has an older cursor than it had: it was restored, or failed over",
                "Check what it lost beyond the buffer's reach",
            ),
            event(
                "dead_lettered",
                "Records that cannot be delivered as they are were set aside; at most one line a minute and sink",
                "`telemetry dlq list`, then fix, replay or purge",
            ),
            event(
                "dead_letters_filling",
                "70, 90 or 100 % of their quota are used; at 100 % the sinks concerned hold",
                "Replay, export or purge them",
            ),
            event(
                "dead_letter_copies_held",
                "Dead letters are kept and wait to be copied to their topic",
                "Mend what the error names",
            ),
            event(
                "dead_letter_copies_wait",
                "The copying of dead letters waits for the cluster",
                "It goes on by itself once the cluster answers",
            ),
            event("dead_letters_copied", "Dead letters are copied again", ""),
            event(
                "dead_letter_not_copied",
                "The brokers refuse the copy of a dead letter for good, or making it panicked; the letter itself stays",
                "As the error says, or leave it: `telemetry dlq show` has the letter",
            ),
            event("dead_letters_replayed", "A person had dead letters delivered again", ""),
            event(
                "dead_letter_fixed",
                "A person corrected a dead letter; the line has the new payload",
                "",
            ),
            event("dead_letters_purged", "A person deleted dead letters", ""),
        ],
    },
    Chapter {
        title: "Migrations and upkeep of databases",
        events: &[
            event(
                "migration_waiting",
                "For long a database could not be migrated: it is away, or somebody else holds the migration lock",
                "What `error` says: bring it back, or look who migrates",
            ),
            event("migration_applied", "A migration was applied", ""),
            event(
                "migration_failed",
                "A migration was refused or failed: the writers of this database stay off",
                "Mend the file or the rights; it is tried again by itself, but for a file that could not be rolled back",
            ),
            event(
                "database_tier",
                "The database is ready; `tier` tells whether TimescaleDB is used",
                "",
            ),
            event("partitions_made", "Partitions for the days to come were made", ""),
            event("partitions_dropped", "Partitions older than `retention_days` were dropped", ""),
            event(
                "upkeep_failed",
                "A task of the database failed; rows are written all the same",
                "Mend what the error names; it is tried again by itself",
            ),
            event("upkeep_recovered", "The task works again", ""),
        ],
    },
    Chapter {
        title: "HTTP, tokens, certificates",
        events: &[
            event(
                "http_order",
                "A token was used for an order; the lines of what it did bear the same `correlation_id`",
                "",
            ),
            event(
                "http_refused",
                "Requests were refused; at most one line a minute",
                "See who asks, when you do not know the address",
            ),
            event(
                "http_crowded",
                "One address had too many connections and new ones were closed; at most one line a minute",
                "See who it is; behind a proxy raise `connections_per_peer_max`",
            ),
            event("http_certificate_renewed", "The listener took up a renewed certificate", ""),
            event(
                "http_certificate_unusable",
                "The renewed certificate cannot be used; the old one goes on",
                "Correct the file",
            ),
            event(
                "tokens_unreadable",
                "The file of tokens cannot be read: no token counts",
                "Correct its rights or restore it",
            ),
            event(
                "certificate_expires",
                "A certificate expires in less than 30 or 7 days, or has expired, or cannot be read",
                "Renew it: `telemetry certs renew` for those of `telemetry certs`",
            ),
            event("certificate_renewed", "The certificate is good again", ""),
        ],
    },
    Chapter {
        title: "Simulator",
        events: &[event("publication_refused", "The broker refused a simulated message", "")],
    },
];
