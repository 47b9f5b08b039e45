//! The rings between guest and launcher as ordinary byte streams.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use vmm_shared::addr::NodeId;
use vmm_shared::ring::ByteRing;

use crate::doorbell::{Bell, Doorbells};
use crate::fleet::Fleet;
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
    pub fleet: Arc<Fleet>,
}

impl Link {
    /// Whether nobody serves the other end any more.
    fn is_over(&self) -> bool {
        self.node.ended().is_some() || self.fleet.is_frozen()
    }
}

/// The consumer's end of a ring. Reads block until there is something; the
/// stream ends when the node has ended, or its VM is frozen, and all is read.
#[derive(Debug)]
pub struct RingReader {
    ring: ByteRing,
    link: Link,
}

/// The producer's end of a ring. Writes block until there is room; they fail
/// when the node has ended or its VM is frozen.
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

    /// Writes what there is room for now, perhaps nothing.
    pub fn write_now(&mut self, bytes: &[u8]) -> usize {
        let count = self.ring.write(bytes);
        if count > 0 && self.ring.must_wake_consumer() {
            self.link.doorbells.kick(self.link.id);
        }
        count
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
            let ended = self.link.is_over();
            let count = self.ring.read(into);
            if count > 0 {
                if self.ring.must_wake_producer() {
                    self.link.doorbells.kick(self.link.id);
                }
                return Ok(count);
            }
            if ended {
                return Ok(0);
            }
            if self.ring.arm_consumer() {
                self.link.bell.wait(rings, LOOK_AGAIN);
            }
        }
    }
}

impl Write for RingWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        loop {
            if self.link.is_over() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let rings = self.link.bell.rings();
            let count = self.write_now(bytes);
            if count > 0 {
                return Ok(count);
            }
            if self.ring.arm_producer() {
                self.link.bell.wait(rings, LOOK_AGAIN);
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doorbell::Plug;
    use crate::region::Region;
    use std::os::fd::AsFd;
    use std::time::Instant;
    use vmm_shared::control::{BUNDLE_OFFSET, ControlRegion, RingId};
    use vmm_shared::region::RegionKind;

    fn link_and_ring() -> (Link, ByteRing) {
        let region = Region::create(RegionKind::Control, [0; 16], 0, BUNDLE_OFFSET).expect("made");
        let control = ControlRegion::new(region.map().expect("mapped")).expect("large enough");
        let plug = Plug {
            cores: 1,
            control: region.file().as_fd(),
        };
        let (doorbells, _) = Doorbells::new(&[plug]).expect("made");
        let link = Link {
            bell: Arc::default(),
            doorbells: Arc::new(doorbells),
            node: Arc::default(),
            id: NodeId(0),
            fleet: Arc::default(),
        };
        (link, control.ring(RingId::AgentOut))
    }

    #[test]
    fn many_bytes_pass_in_order_even_without_a_single_doorbell() {
        const TOTAL: usize = 3 << 20;
        let (link, ring) = link_and_ring();
        let mut writer = RingWriter::new(ring, link.clone());
        let mut reader = RingReader::new(ring, link);
        let byte = |at: usize| u8::try_from(at % 253).expect("below 256");
        let sender = std::thread::spawn(move || {
            let data: Vec<u8> = (0..TOTAL).map(byte).collect();
            writer.write_all(&data).expect("the node lives");
        });
        let mut data = vec![0; TOTAL];
        reader.read_exact(&mut data).expect("the node lives");
        assert!(data.iter().enumerate().all(|(at, got)| *got == byte(at)));
        sender.join().expect("no panic");
    }

    #[test]
    fn what_a_node_wrote_before_it_ended_is_still_read() {
        let (link, ring) = link_and_ring();
        assert_eq!(ring.write(b"last words"), 10);
        link.node.set_ended(crate::node::NodeEnd::Panic);
        let mut text = String::new();
        let mut reader = RingReader::new(ring, link.clone());
        reader.read_to_string(&mut text).expect("ends");
        assert_eq!(text, "last words");
        let refused = RingWriter::new(ring, link).write(b"x").expect_err("ended");
        assert_eq!(refused.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_writer_that_waits_for_a_node_is_released_by_its_end() {
        let (link, ring) = link_and_ring();
        let node = Arc::clone(&link.node);
        let mut writer = RingWriter::new(ring, link);
        let waiting = std::thread::spawn(move || writer.write_all(&vec![0; 2 << 20]));
        std::thread::sleep(Duration::from_millis(50));
        let start = Instant::now();
        node.set_ended(crate::node::NodeEnd::Killed(9));
        assert!(waiting.join().expect("no panic").is_err());
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
