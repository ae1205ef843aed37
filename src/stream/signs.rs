//! What a stream shows of its connection: the board, the counters, one log line per change.

use std::mem::Discriminant;
use std::sync::Arc;

use super::connection::Watcher;
use super::error::StreamError;
use super::heard::Heard;
use super::inlet::Inlet;
use super::notes::Notes;
use super::unacknowledged::Intake;
use crate::config::StreamSettings;
use crate::domain::{CorrelationId, ErrorClass, Incident, Runbook, Sequence};
use crate::observe::{DependencyView, DisconnectReason, Silence, StreamView};

/// What was heard of the broker before a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contact {
    Nothing,
    /// It answered, and not with a welcome.
    Refusal,
    Welcome,
}

pub struct Signs {
    stream: String,
    broker: String,
    filter: String,
    asked_qos: u8,
    view: Arc<StreamView>,
    dependency: Arc<DependencyView>,
    notes: Notes,
    heard: Heard,
    /// The limit of silence last told.
    silence: Option<&'static str>,
    quiet: Incident,
    /// Since the connection was lost: the broker's outage, or trouble of this stream alone.
    away: Option<CorrelationId>,
    session_present: bool,
    active: bool,
    /// The trouble last logged: the same again is not news.
    trouble: Option<Discriminant<StreamError>>,
    warned_of_qos: bool,
}

impl Signs {
    pub fn new(
        settings: &StreamSettings,
        view: Arc<StreamView>,
        dependency: Arc<DependencyView>,
        notes: Notes,
        heard: Heard,
    ) -> Self {
        Signs {
            stream: settings.name.to_string(),
            broker: settings.broker.clone(),
            filter: settings.topic_filter.clone(),
            asked_qos: settings.qos,
            view,
            dependency,
            notes,
            heard,
            silence: None,
            quiet: Incident::default(),
            away: None,
            session_present: false,
            active: false,
            trouble: None,
            warned_of_qos: false,
        }
    }

    /// Notes what is known now.
    pub fn note<I: Intake>(&mut self, inlet: &Inlet<I>) {
        self.notes.note(&inlet.repeats, inlet.unacknowledged.acknowledged());
    }

    pub fn into_notes(self) -> (Notes, Heard) {
        (self.notes, self.heard)
    }

    /// Says once per limit that the stream is silent, and once that it is not any more.
    fn tell_silence(&mut self, silence: Option<Silence>) {
        let severity = silence.map(|silence| silence.severity);
        if self.silence == severity {
            return;
        }
        let stream = self.stream.as_str();
        match silence {
            Some(Silence { severity, limit_seconds, .. }) => tracing::warn!(
                event = "stream_silent",
                runbook = Runbook::StreamSilent.page(),
                correlation_id = %self.quiet.id(),
                stream,
                severity,
                limit_seconds,
                "subscribed, and no message for longer than the configuration allows"
            ),
            None => {
                let correlation_id = self.quiet.end().map(tracing::field::display);
                tracing::info!(
                    event = "stream_heard",
                    correlation_id,
                    stream,
                    "messages come again"
                );
            }
        }
        self.silence = severity;
    }

    /// A connection was lost, or did not come about.
    pub fn lost(&mut self, error: &StreamError) -> Contact {
        use DisconnectReason::{Keepalive, Network, Tls};
        let heard = match error.reason() {
            _ if self.view.status().connected => Contact::Welcome,
            Network | Keepalive | Tls => Contact::Nothing,
            // Of this client alone, perhaps: the others must not wait for it.
            _ => Contact::Refusal,
        };
        self.tell_lost(error);
        heard
    }

    fn tell_lost(&mut self, error: &StreamError) {
        self.view.meters.disconnected(error.reason()).inc();
        if error.reason() == DisconnectReason::Protocol {
            self.view.meters.rejected_messages.inc();
        }
        let text = error.to_string();
        self.show_inactive(Some(text.clone()));
        let (stream, broker) = (self.stream.as_str(), self.broker.as_str());
        if error.is_of_broker() {
            self.dependency.unreachable(&text);
        }
        let correlation_id = self.away.get_or_insert_with(|| match error.is_of_broker() {
            true => self.dependency.outage().id(),
            false => CorrelationId::new(),
        });
        // One line per loss, whatever it looks like at each attempt; another one when a person must look.
        let known = self.trouble.is_some() && error.class() != ErrorClass::Standing;
        if known || self.trouble.replace(error.kind()) == Some(error.kind()) {
            return;
        }
        match error.class() {
            ErrorClass::Standing => tracing::error!(
                event = "stream_input_active",
                runbook = Runbook::StreamNotSubscribed.page(),
                %correlation_id,
                active = false,
                stream,
                broker,
                trouble = text,
                "not receiving"
            ),
            _ => tracing::warn!(
                event = "stream_input_active",
                runbook = Runbook::StreamNotSubscribed.page(),
                %correlation_id,
                active = false,
                stream,
                broker,
                trouble = text,
                "not receiving"
            ),
        }
    }

    /// The breaker is open and another stream's trial will tell.
    pub fn resting(&mut self) {
        if self.view.status().trouble.is_none() {
            self.show_inactive(self.dependency.status().trouble);
        }
    }

    /// The connection ended because it was told to.
    pub fn ended(&mut self) {
        if std::mem::take(&mut self.active) {
            self.view.meters.disconnected(DisconnectReason::Stop).inc();
            let stream = self.stream.as_str();
            tracing::info!(event = "stream_input_active", active = false, stream, "disconnected");
        }
        self.show_inactive(None);
    }

    pub fn paused(&mut self) {
        self.show_inactive(Some("paused by an operator; resume it to receive again".to_owned()));
    }

    fn show_inactive(&mut self, trouble: Option<String>) {
        self.active = false;
        self.view.update(|status| {
            status.connected = false;
            status.subscribed = false;
            status.granted_qos = None;
            status.trouble = trouble;
        });
    }
}

impl Watcher for Signs {
    fn let_in(&mut self, session_present: bool) {
        self.session_present = session_present;
        self.view.update(|status| status.connected = true);
        self.dependency.breaker().succeeded();
        self.dependency.reachable();
        if !session_present && self.view.status().sequence > Sequence::ZERO {
            let stream = self.stream.as_str();
            tracing::warn!(
                event = "session_new",
                correlation_id = self.away.as_ref().map(tracing::field::display),
                stream,
                "the broker had no session for this stream, so what was published while it was \
                 disconnected is not delivered; check the broker's persistence and session expiry"
            );
        }
    }

    fn subscribed(&mut self, granted_qos: u8) {
        self.active = true;
        self.trouble = None;
        self.view.meters.connects.inc();
        self.view.update(|status| {
            status.subscribed = true;
            status.granted_qos = Some(granted_qos);
            status.asked_qos = self.asked_qos;
            status.trouble = None;
        });
        let stream = self.stream.as_str();
        tracing::info!(
            event = "stream_input_active",
            correlation_id = self.away.take().map(tracing::field::display),
            active = true,
            stream,
            topic_filter = self.filter,
            granted_qos,
            session_present = self.session_present,
            "receiving"
        );
        if granted_qos < self.asked_qos && !std::mem::replace(&mut self.warned_of_qos, true) {
            tracing::warn!(
                event = "qos_lowered",
                stream,
                asked_qos = self.asked_qos,
                granted_qos,
                "the broker delivers with a lower quality of service: what is under way when it \
                 or the node stops is lost; raise it in the broker's configuration"
            );
        }
    }

    fn tick<I: Intake>(&mut self, inlet: &Inlet<I>) {
        self.notes.tick(&inlet.repeats, inlet.unacknowledged.acknowledged());
        let status = self.view.status();
        self.heard.tick(status.last_message);
        self.tell_silence(status.silence());
    }
}
