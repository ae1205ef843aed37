//! The row of one table.

use std::borrow::Cow;

use super::convert::{Converted, Flags, Refusal};
use super::plan::{Message, Plan, Stop};
use super::rule::{Problems, Source, Use};
use super::{Column, Fault, MappingError, Observed, Outcome, Value, explain::FieldTrace};
use crate::config::{StreamSettings, TableKind, TableSettings};
use crate::domain::{Record, Stage};

/// Makes rows of one table. Owns its scratch memory.
#[derive(Debug)]
pub struct RowMapper {
    plan: Plan,
    columns: Vec<Column>,
    /// The rule of each column.
    rules: Vec<usize>,
    /// A latest-state table: the rules of which at least one needs a value in the message. `None` = append.
    settings: Option<Vec<usize>>,
    /// Owned texts, so that their memory serves the next message.
    values: Vec<Value<'static>>,
}

impl RowMapper {
    /// Compiles the mapping of the stream for one of its tables; the error lists every problem at once.
    pub fn compile(
        stream: &StreamSettings,
        table: &TableSettings,
    ) -> Result<Self, Vec<MappingError>> {
        let mut problems = Problems::default();
        let mut plan = Plan::compile(&stream.mapping, Use::Table, &mut problems);
        let mut columns = Vec::new();
        let mut rules = Vec::new();
        for (column, field) in wanted(table) {
            let Some(rule) = stream.mapping.fields.get_index_of(field) else {
                let problem = format!("fills column {column:?}, but no field has this name");
                problems.add(field, problem);
                continue;
            };
            let required = plan.rules.get(rule).is_some_and(|rule| rule.never_null())
                || *field == stream.mapping.device_id;
            let field_type = stream.mapping.fields[rule].field_type;
            let (name, field) = (column.to_owned(), field.to_owned());
            columns.push(Column { name, field, field_type, required });
            rules.push(rule);
        }
        let settings = settings_of(stream, table, &mut problems);
        if !problems.0.is_empty() {
            return Err(problems.0);
        }
        plan.restrict_require_any(|index| rules.contains(&index));
        let values = vec![Value::Null; columns.len()];
        Ok(RowMapper { plan, columns, rules, settings, values })
    }

    /// The columns of the settings in their order, then those set at the first insert only.
    pub fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// The values of the record's row, one per column, valid until the next call.
    pub fn map<'m>(&'m mut self, record: &'m Record<'_>) -> Outcome<&'m [Value<'m>]> {
        match self.fill(record) {
            Ok(flags) => {
                self.plan.count(flags);
                Outcome::Mapped(&self.values)
            }
            Err(stop) => stop.into(),
        }
    }

    fn fill(&mut self, record: &Record<'_>) -> Result<Flags, Stop> {
        let message = self.plan.admit(record)?;
        self.check_counts(&message)?;
        let mut flags = Flags::default();
        for (at, rule) in self.rules.iter().enumerate() {
            let converted = self.plan.value(*rule, &message, &mut flags);
            let converted = converted.map_err(|refusal| self.fault(at, refusal))?;
            store(&mut self.values[at], converted);
        }
        for (at, rule) in self.rules.iter().enumerate() {
            if matches!(self.plan.rules[*rule].source, Source::Flags) {
                store(&mut self.values[at], Plan::flags_value(flags));
            }
        }
        Ok(flags)
    }

    /// Required fields first; then, for a latest-state table, whether there is anything to set.
    fn check_counts(&self, message: &Message<'_>) -> Result<(), Stop> {
        if !self.plan.is_complete(message, self.rules.iter().copied()) {
            return Err(Stop::Incomplete);
        }
        match &self.settings {
            Some(settings) if !settings.iter().any(|rule| self.plan.is_present(*rule, message)) => {
                Err(Stop::Filtered)
            }
            _ => Ok(()),
        }
    }

    fn fault(&self, at: usize, refusal: Refusal) -> Stop {
        let Refusal { reason, detail } = refusal;
        let field = Some(self.columns[at].name.clone());
        Stop::Dead(Fault { stage: Stage::Map, reason, field, detail })
    }

    /// What the mapper saw beside its values since the last call.
    pub fn observed(&mut self) -> Observed {
        self.plan.observed()
    }

    /// What each rule makes of the message; empty when it cannot be read or does not count.
    pub(super) fn trace(&mut self, record: &Record<'_>) -> Vec<FieldTrace> {
        FieldTrace::all(&mut self.plan, record, &self.rules)
    }
}

/// Column and field, in the order of the row.
fn wanted(table: &TableSettings) -> Vec<(&str, &str)> {
    let mut wanted: Vec<(&str, &str)> =
        table.columns.iter().map(|(field, column)| (column.as_str(), field.as_str())).collect();
    if let TableKind::Latest { insert_only, .. } = &table.kind {
        for (column, field) in insert_only {
            if !wanted.iter().any(|(known, _)| known == column) {
                wanted.push((column, field));
            }
        }
    }
    wanted
}

/// The fields that make a message a settings message: neither the key, nor set at the first insert only, nor the same
/// in every message.
fn settings_of(
    stream: &StreamSettings,
    table: &TableSettings,
    problems: &mut Problems,
) -> Option<Vec<usize>> {
    let TableKind::Latest { key, insert_only, .. } = &table.kind else {
        return None;
    };
    if !table.columns.contains_key(key) {
        problems
            .add(key, format!("is the key of table {:?}, but has no column there", table.table));
    }
    let fields = &stream.mapping.fields;
    let counts = table.columns.iter().filter(|(field, column)| {
        let of_message = fields.get(*field).is_some_and(|settings| {
            use crate::config::FieldSource::{Paths, TopicLevel};
            matches!(settings.source, Paths(_) | TopicLevel(_))
        });
        of_message && *field != key && !insert_only.contains_key(*column)
    });
    Some(counts.filter_map(|(field, _)| fields.get_index_of(field)).collect())
}

/// Puts a value into its place, reusing the text memory there.
fn store(place: &mut Value<'static>, converted: Converted<'_>) {
    *place = match converted {
        Converted::Null => Value::Null,
        Converted::Bool(value) => Value::Bool(value),
        Converted::Int(value) => Value::Int(value),
        Converted::Float { value, .. } => Value::Float(value),
        Converted::Timestamp(micros) => Value::Timestamp(micros),
        Converted::Text { value, .. } => {
            if let Value::Text(Cow::Owned(text)) = place {
                text.clear();
                text.push_str(&value);
                return;
            }
            Value::Text(Cow::Owned(value.into_owned()))
        }
    };
}
