//! What the node itself looks at again and again, each a part: a look that panics or hangs ends its own life and no other.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use super::clock::ClockWatch;
use super::disk::DiskWatch;
use super::supervisor::{PartSpec, Side};
use super::thread::Thread;
use crate::buffer::Buffer;
use crate::config::Settings;
use crate::crash::part_point;
use crate::observe::{Board, CertificateWatch};
use crate::part::{Control, Part, PartResult, Phase};

/// Something to look at.
pub trait Watch: Unpin + 'static {
    const NAME: &'static str;
    /// Between two looks.
    const INTERVAL: Duration;

    fn look(&mut self) -> impl Future<Output = ()>;

    /// Returns when there is a reason to look before the interval is over.
    fn news(&mut self) -> impl Future<Output = ()> {
        std::future::pending()
    }
}

/// One life of a watch.
struct Watcher<W>(W);

impl<W: Watch> Part for Watcher<W> {
    async fn run(self, mut control: Control) -> PartResult {
        let Watcher(mut watch) = self;
        while control.phase() == Phase::Running {
            if control.paused() {
                control.changed().await;
                continue;
            }
            control.progress.set_work_waiting(true);
            part_point(|| format!("part_watch_{}", W::NAME)).await;
            watch.look().await;
            control.progress.set_work_waiting(false);
            tokio::select! {
                _ = control.sleep(W::INTERVAL) => {}
                () = watch.news() => {}
            }
        }
        Ok(())
    }
}

/// All of them. They share a thread, on which nothing else lives.
pub fn watches(
    board: &Arc<Board>,
    buffer: &Buffer,
    stall_timeout: Duration,
    settings: &tokio::sync::watch::Receiver<Arc<Settings>>,
) -> [PartSpec; 3] {
    let thread = Thread::start("watches");
    let clock = {
        let board = board.clone();
        spec(&thread, move || ClockWatch::new(board.clone()))
    };
    let disk = {
        let (buffer, board) = (buffer.clone(), board.clone());
        spec(&thread, move || DiskWatch::new(buffer.clone(), board.clone(), stall_timeout))
    };
    let certificates = {
        let (settings, board) = (settings.clone(), board.clone());
        spec(&thread, move || CertificateWatch::new(settings.clone(), board.clone()))
    };
    [clock, disk, certificates]
}

fn spec<W: Watch>(thread: &Thread, build: impl Fn() -> W + Send + Sync + 'static) -> PartSpec {
    let name = format!("watch:{}", W::NAME);
    PartSpec::new(name, Side::Delivery, thread.clone(), move || Watcher(build()))
}

impl Watch for CertificateWatch {
    const NAME: &'static str = "certificates";
    const INTERVAL: Duration = Duration::from_secs(10);

    async fn look(&mut self) {
        CertificateWatch::look(self).await;
    }

    async fn news(&mut self) {
        self.reloaded().await;
    }
}
