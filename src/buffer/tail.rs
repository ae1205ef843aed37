//! The newest durable blocks in memory: a sink that keeps up never touches the disk.

use std::collections::{BTreeMap, VecDeque};

use super::block::Block;
use crate::domain::{Sequence, StreamName};
use crate::observe::EdgeMeter;

/// What a block costs beside its bytes, about.
const BLOCK_OVERHEAD_BYTES: usize = 96;

/// All streams together stay within the bound; the oldest block of whatever stream goes first.
#[derive(Debug)]
pub(super) struct Tail {
    streams: BTreeMap<StreamName, VecDeque<Block>>,
    order: VecDeque<StreamName>,
    bytes: usize,
    bytes_max: usize,
    shown: EdgeMeter,
}

impl Tail {
    pub(super) fn new(bytes_max: usize, shown: EdgeMeter) -> Self {
        Tail { streams: BTreeMap::new(), order: VecDeque::new(), bytes: 0, bytes_max, shown }
    }

    /// Adds durable blocks of a stream, in order.
    pub(super) fn push(&mut self, stream: &StreamName, blocks: Vec<Block>) {
        let kept = self.streams.entry(stream.clone()).or_default();
        for block in blocks {
            self.bytes += block.bytes() + BLOCK_OVERHEAD_BYTES;
            self.order.push_back(stream.clone());
            kept.push_back(block);
        }
        while self.bytes > self.bytes_max {
            let Some(oldest) = self.order.pop_front() else { break };
            let evicted = self.streams.get_mut(&oldest).and_then(VecDeque::pop_front);
            self.bytes -= evicted.map_or(0, |block| block.bytes() + BLOCK_OVERHEAD_BYTES);
        }
        self.shown.set(self.bytes);
    }

    /// The blocks after `position`, at least one, at most about `bytes_max`; `None` when the first of them is no
    /// longer here.
    pub(super) fn read(
        &self,
        stream: &StreamName,
        position: Sequence,
        bytes_max: usize,
    ) -> Option<Vec<Block>> {
        let blocks = self.streams.get(stream)?;
        let begin = blocks.partition_point(|block| block.range().last <= position);
        let first = blocks.get(begin)?;
        if first.range().first > position.next() {
            return None;
        }
        let mut bytes = 0;
        let wanted = blocks.range(begin..).take_while(|block| {
            let more = bytes == 0 || bytes < bytes_max;
            bytes += block.bytes();
            more
        });
        Some(wanted.cloned().collect()).filter(|blocks: &Vec<Block>| !blocks.is_empty())
    }
}
