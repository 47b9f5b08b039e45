//! What the commands say to the process that holds a rack.
//!
//! A client sends one request, a line of JSON, and gets one line of JSON
//! back. After [`Request::Exec`] the connection then carries the agent's
//! protocol (see [`vmm_shared::agent`]), after [`Request::Console`] bare
//! bytes.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use crate::tables::{Changed, ClusterReport, Event, JobReport, PlanReport, Wanted};

/// Changes with everything in this module.
pub(crate) const VERSION: u32 = 6;
/// Longest line of either side.
const MAX_LINE: usize = 1 << 20;

/// A request with the version of the program that makes it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Envelope {
    pub version: u32,
    pub request: Request,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// How is everything?
    Status,
    /// Let me run commands.
    Exec,
    /// Join me to the serial console.
    Console {
        /// Go on when all that was kept has been sent.
        follow: bool,
    },
    /// How are the cluster's tables?
    Cluster,
    /// What has been changed from a position of the log on?
    Events { since: u64 },
    /// What would a change take, or the best placement?
    Explain { wanted: Option<Wanted> },
    /// Which policy is in force?
    Policy,
    /// Change something.
    Change {
        wanted: Wanted,
        /// The request's number, for the journal.
        request: u64,
        /// Only say what would come of it.
        dry_run: bool,
    },
    /// Wait for the end of a job, so long at most.
    Wait { job: u32, milliseconds: u64 },
    /// Let a node come back.
    Join { node: u16, dry_run: bool },
    /// Change the VM's memory past the cluster's tables; it may take so many
    /// seconds.
    Direct { change: Direct, seconds: u64 },
    /// Stop; the guest gets so many seconds to switch itself off.
    Down { seconds: u64 },
}

/// What of the running VM's memory is to change.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Direct {
    /// So much memory comes from this node.
    AddMemory { node: u16, bytes: u64 },
    /// So much goes back to it.
    RemoveMemory { node: u16, bytes: u64 },
    /// So many pieces of memory move.
    Slices { from: u16, to: u16, count: u32 },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    /// To be followed by what the request is for.
    Ready,
    /// To [`Request::Status`].
    Status(Box<Report>),
    /// To [`Request::Cluster`].
    Cluster(Box<ClusterReport>),
    /// To [`Request::Events`].
    Events(Vec<Event>),
    /// To [`Request::Explain`].
    Plan(Box<PlanReport>),
    /// To [`Request::Policy`].
    Policy(String),
    /// To [`Request::Change`] and [`Request::Join`].
    Changed(Box<Changed>),
    /// To [`Request::Wait`]: the job, if there is one.
    Job(Option<JobReport>),
    /// To [`Request::Down`]: all is stopped.
    Stopped,
    /// The request can't be served: why, and what to do.
    Refused(String),
}

/// A rack and its VM as they are now. Printed as it is by `--json`, so names
/// and meanings stay.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub name: String,
    /// "kvm" or "tcg".
    pub accelerator: String,
    /// The process that holds the rack.
    pub pid: u32,
    pub uptime_seconds: f64,
    pub vm: VmReport,
    /// The tables; none if the rack's log can't be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterReport>,
    pub nodes: Vec<NodeReport>,
    /// The VM's memory from its start to its end.
    pub memory: Vec<RunReport>,
    pub vcpus: Vec<VcpuReport>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VmReport {
    /// "starting", "running", "frozen", "powered-off", "reset", "crashed" or
    /// "failed".
    pub state: String,
    /// vCPUs that the operator wants.
    pub vcpus: u32,
    /// vCPUs that the nodes have given.
    pub vcpus_granted: u32,
    /// vCPUs that the guest has started.
    pub vcpus_seen: u32,
    /// vCPUs that there is room for.
    pub vcpus_max: u32,
    /// Memory that the operator wants.
    pub memory_bytes: u64,
    /// Shared memory besides that, which the nodes need to share it.
    pub metadata_bytes: u64,
    /// Memory that the nodes have given.
    pub memory_granted_bytes: u64,
    /// Memory that the guest has taken into use.
    pub memory_seen_bytes: u64,
    /// Memory that there is room for.
    pub memory_max_bytes: u64,
    /// Why it does not run any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NodeReport {
    pub id: u16,
    /// "absent", "joined", "ready", "fenced", "stopped" or "unknown".
    pub state: String,
    /// "data" or "control".
    pub role: String,
    pub cores: u32,
    pub vcpus: u32,
    /// What it says of its replica of the tables, once it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replica: Option<ReplicaReport>,
    /// What it gives now.
    pub memory_bytes: u64,
    /// What the VM was started with and the guest takes to be near it, as it
    /// was told at boot; where that begins in the VM's memory; and how much of
    /// it, and of what was added since, other nodes give now.
    pub memory_home_bytes: u64,
    pub memory_offset_bytes: u64,
    pub memory_away_bytes: u64,
    /// What it has given since the start, what the guest has taken into use of
    /// that, and what it could still give so.
    pub memory_added_bytes: u64,
    pub memory_added_seen_bytes: u64,
    pub memory_free_bytes: u64,
    /// The most that it could give.
    pub memory_room_bytes: u64,
    /// What it has taken over from others so far, how long copying that took,
    /// and the longest time for which a piece of it was out of reach.
    pub memory_taken_bytes: u64,
    pub memory_copying_us: u64,
    pub memory_longest_us: u64,
    pub pid: i32,
    /// In the order in which operators want to see them; JSON has an object.
    #[serde(with = "counters")]
    pub counters: Vec<(String, u64)>,
    /// Interrupts that its vCPUs have sent to vCPUs on each node.
    pub ipis_to: Vec<u64>,
}

/// A run of the VM's memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RunReport {
    pub bytes: u64,
    /// The node that the guest takes it to be near.
    pub home: u16,
    /// The node that gives it.
    pub node: u16,
}

/// Nodes at the same position have the same digest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ReplicaReport {
    pub position: u64,
    pub digest: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VcpuReport {
    pub id: u16,
    pub node: u16,
    pub core: u32,
    /// "granted", "started" or "moving".
    pub state: String,
    /// Moves so far, and for how long the last one kept it from running.
    pub moves: u64,
    pub blackout_us: u64,
    /// In the order in which operators want to see them; JSON has an object.
    #[serde(with = "counters")]
    pub counters: Vec<(String, u64)>,
}

/// Names and values as an object that keeps their order.
mod counters {
    use std::fmt;

    use serde::de::{MapAccess, Visitor};
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(
        counters: &[(String, u64)],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(counters.iter().map(|(name, value)| (name, value)))
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(
        deserializer: D,
    ) -> Result<Vec<(String, u64)>, D::Error> {
        struct Pairs;
        impl<'a> Visitor<'a> for Pairs {
            type Value = Vec<(String, u64)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of counts")
            }

            fn visit_map<M: MapAccess<'a>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(pairs)
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

impl NodeReport {
    /// One of the counters; 0 if the node does not count that.
    pub(crate) fn counter(&self, name: &str) -> u64 {
        let found = self.counters.iter().find(|(known, _)| known == name);
        found.map_or(0, |(_, value)| *value)
    }
}

/// Sends one line.
pub(crate) fn send(to: &mut impl Write, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// Receives one line, and not a byte more: what follows is not JSON.
pub(crate) fn receive<T: for<'a> Deserialize<'a>>(from: &mut impl Read) -> io::Result<T> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        from.read_exact(&mut byte)?;
        if byte == [b'\n'] {
            return Ok(serde_json::from_slice(&line)?);
        }
        line.push(byte[0]);
        if line.len() > MAX_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_received_without_what_follows() {
        let mut bytes = Vec::new();
        let request = Envelope {
            version: VERSION,
            request: Request::Down { seconds: 3 },
        };
        send(&mut bytes, &request).expect("in memory");
        bytes.extend(b"more");
        let mut from = bytes.as_slice();
        let back: Envelope = receive(&mut from).expect("a request");
        assert!(matches!(back.request, Request::Down { seconds: 3 }));
        assert_eq!(from, b"more");
    }

    #[test]
    fn garbage_and_endless_lines_are_errors() {
        for garbage in [
            &b"GET / HTTP/1.1\n"[..],
            b"\n",
            b"{\"version\":1}\n",
            b"\xff\n",
            b"",
        ] {
            assert!(receive::<Envelope>(&mut &garbage[..]).is_err());
        }
        let mut endless = io::repeat(b'x');
        assert!(receive::<Envelope>(&mut endless).is_err());
    }
}
