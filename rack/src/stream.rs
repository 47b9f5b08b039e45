//! The rings between guest and launcher as ordinary byte streams.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use vmm_shared::addr::NodeId;
use vmm_shared::ring::ByteRing;

use crate::doorbell::{Bell, Doorbells};
use crate::node::NodeShared;

/// How long a lost doorbell can delay anything.
const LOOK_AGAIN: Duration = Duration::from_millis(25);

/// What both kinds of stream need to know.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub bell: Arc<Bell>,
    pub doorbells: Arc<Doorbells>,
    /// The node that has the other end.
    pub node: Arc<NodeShared>,
    pub id: NodeId,
}

/// The consumer's end of a ring. Reads block until there is something; the
/// stream ends when the node has ended and all is read.
#[derive(Debug)]
pub struct RingReader {
    ring: ByteRing,
    link: Link,
}

/// The producer's end of a ring. Writes block until there is room; they fail
/// when the node has ended.
#[derive(Debug)]
pub struct RingWriter {
    ring: ByteRing,
    link: Link,
}

impl RingReader {
    pub(crate) fn new(ring: ByteRing, link: Link) -> Self {
        Self { ring, link }
    }
}

impl RingWriter {
    pub(crate) fn new(ring: ByteRing, link: Link) -> Self {
        Self { ring, link }
    }
}

impl Read for RingReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        loop {
            let rings = self.link.bell.rings();
            // Asked before the ring is read: what a node wrote before it
            // ended is still delivered.
            let ended = self.link.node.ended().is_some();
            let scarce = self.ring.space() < self.ring.len();
            let count = self.ring.read(into);
            if count > 0 {
                if scarce {
                    // The producer may be waiting for room.
                    self.link.doorbells.kick(self.link.id);
                }
                return Ok(count);
            }
            if ended {
                return Ok(0);
            }
            self.link.bell.wait(rings, LOOK_AGAIN);
        }
    }
}

impl Write for RingWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        loop {
            if self.link.node.ended().is_some() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let rings = self.link.bell.rings();
            let count = self.ring.write(bytes);
            if count > 0 {
                self.link.doorbells.kick(self.link.id);
                return Ok(count);
            }
            self.link.bell.wait(rings, LOOK_AGAIN);
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
