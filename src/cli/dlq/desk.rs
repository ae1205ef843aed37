//! Who carries out orders about dead letters: the running node, or, while it is stopped, this command in its place.

use anyhow::bail;
use serde_json::Value;

use crate::buffer::BufferError;
use crate::cli::client::{self, OrderError};
use crate::config::Settings;
use crate::domain::CorrelationId;
use crate::http::{CONTROL_SOCKET, Orderer, ReplayRequest, ReplayResult};
use crate::node::StoppedNode;

/// For the orders of one command.
pub struct Desk<'a> {
    settings: &'a Settings,
    staff: Staff,
}

enum Staff {
    /// No order was given yet.
    Unknown,
    Running,
    Stopped(Box<StoppedNode>),
}

impl<'a> Desk<'a> {
    pub fn new(settings: &'a Settings) -> Self {
        Desk { settings, staff: Staff::Unknown }
    }

    pub async fn replay(&mut self, request: &ReplayRequest) -> anyhow::Result<Vec<ReplayResult>> {
        match self.ask("/dlq/replay", request).await? {
            Some(answer) => Ok(serde_json::from_value(answer)?),
            None => Ok(self.stopped()?.letters().replay(request, &orderer()).await?),
        }
    }

    pub async fn purge(&mut self, request: &ReplayRequest) -> anyhow::Result<()> {
        if self.ask("/dlq/purge", request).await?.is_none() {
            self.stopped()?.letters().purge(request, &orderer()).await?;
        }
        Ok(())
    }

    /// After the last order: a node that is being started meanwhile finds its lock taken until then.
    pub async fn close(self) -> anyhow::Result<()> {
        match self.staff {
            Staff::Stopped(node) => Ok(node.close().await?),
            Staff::Unknown | Staff::Running => Ok(()),
        }
    }

    /// `None` when no node runs.
    async fn ask(&mut self, path: &str, request: &ReplayRequest) -> anyhow::Result<Option<Value>> {
        if matches!(self.staff, Staff::Stopped(_)) {
            return Ok(None);
        }
        let socket = self.settings.node.state_dir.join(CONTROL_SOCKET);
        match client::order(&socket, path, Some(request)).await {
            Ok(answer) => {
                self.staff = Staff::Running;
                Ok(Some(answer))
            }
            Err(OrderError::NotRunning(_)) if matches!(self.staff, Staff::Unknown) => Ok(None),
            Err(OrderError::NotRunning(_)) => {
                bail!("the node has ended meanwhile: give the same command again for what is left")
            }
            Err(OrderError::Failed(error)) => Err(error),
        }
    }

    fn stopped(&mut self) -> anyhow::Result<&StoppedNode> {
        if !matches!(self.staff, Staff::Stopped(_)) {
            // The node is not there to say in its log what is done, so this command does.
            crate::observe::start_logging(&self.settings.log)?;
            let node = StoppedNode::open(self.settings).map_err(|error| match error {
                BufferError::Locked { path } => anyhow::anyhow!(
                    "{} is held, and no node answers: it is just starting or stopping, or another command is at work; \
                     try again in a moment",
                    path.display()
                ),
                error => error.into(),
            })?;
            self.staff = Staff::Stopped(Box::new(node));
        }
        match &self.staff {
            Staff::Stopped(node) => Ok(node),
            Staff::Unknown | Staff::Running => bail!("the node runs"),
        }
    }
}

fn orderer() -> Orderer {
    let by = format!("uid {}", rustix::process::getuid().as_raw());
    Orderer { by, correlation_id: CorrelationId::new() }
}
