//! The control role: which node gives what is decided here.
//!
//! Of the nodes with this role one is in charge: the last that has said so in
//! the log. When that one is gone, another takes over, or the same one when it
//! has been started again, and goes on with what the log says.
//!
//! ```text
//!   sign of life, doorbell ──> in charge? ──> calls ──> joins, losses ──> jobs
//! ```

mod executor;

use control_plane::cluster::{Change, Op};
use control_plane::optimise::Share;
use control_plane::role::{Executor, Reply, Role, Tables};
use vmm_shared::addr::{Location, NodeId};
use vmm_shared::coherence::NodeSet;
use vmm_shared::control::BootConfig;
use vmm_shared::log::ReplicaError;
use vmm_shared::rpc::{Refused, Request, RpcError};

use self::executor::NodeExecutor;
use crate::fabric::Fabric;
use crate::fabric::cluster::{Calls, ClusterMember, Follower};
use crate::fabric::keeper::Held;

/// Things done for jobs between two looks at the doorbell.
const TURNS: usize = 16;

/// The control role of this node.
#[derive(Debug, Default)]
pub struct Control {
    role: Role,
    /// Whether this node was in charge when it looked last.
    in_charge: bool,
}

impl Control {
    /// Does what is to be done now. A node that is alone has nothing to decide.
    pub fn attend(&mut self, fabric: &Fabric, config: &BootConfig) {
        let Some(member) = fabric.cluster() else {
            return;
        };
        let mut executor = NodeExecutor {
            control: fabric.control(),
            config,
            ring: &|node| fabric.kick(Location { node, core: 0 }),
            may_ask: &|| fabric.held() != Some(Held::Fenced),
        };
        let done = member
            .with(|follower, calls| self.work((member, config), follower, calls, &mut executor));
        if let Some(Err(error)) = done {
            log::warn!("the control role has to wait: {error:?}");
        }
    }

    fn work(
        &mut self,
        (member, config): (&ClusterMember, &BootConfig),
        follower: &Follower,
        calls: &mut Calls,
        executor: &mut impl Executor,
    ) -> Result<(), ReplicaError> {
        let clock = member.clock();
        let mut tables = follower.thread().ok_or(ReplicaError::TimedOut)?;
        let is_alive = |node| member.is_alive(node);
        let in_charge = self.role.take_over(member.node(), is_alive, &mut tables)?;
        if in_charge && !self.in_charge {
            log::info!("node {} is in charge", member.node().0);
        }
        self.in_charge = in_charge;
        while let Some(request) = member.next_call(calls) {
            let reply = if in_charge {
                let Request { header, .. } = &request;
                let (method, body) = (header.method, request.body());
                self.role.answer(method, body, &mut tables, executor, clock)
            } else {
                Reply::NoSuchMethod
            };
            if let Err(error) = send(calls, &request, &reply) {
                log::warn!("an answer could not be sent: {error:?}");
            }
        }
        if !in_charge {
            return Ok(());
        }
        for change in arrivals_and_losses(config, is_alive, &mut tables)? {
            log::info!("{change:?}");
            // A refusal is in the journal.
            let _ = tables.append(Op::from(change), &[])?;
        }
        for _ in 0..TURNS {
            if !self.role.turn(&mut tables, executor, clock)? {
                break;
            }
        }
        Ok(())
    }
}

fn send(calls: &mut Calls, request: &Request, reply: &Reply) -> Result<(), RpcError> {
    match reply {
        Reply::Answer(answer) => calls.answer_with(request, answer),
        Reply::Taken => calls.answer(request, &[]),
        Reply::NoSuchMethod => calls.refuse(request, Refused::NO_SUCH_METHOD),
        Reply::BadArguments => calls.refuse(request, Refused::BAD_ARGUMENTS),
    }
}

/// What the tables do not know yet of the rack's nodes.
fn arrivals_and_losses<T: Tables>(
    config: &BootConfig,
    is_alive: impl Fn(NodeId) -> bool,
    tables: &mut T,
) -> Result<alloc::vec::Vec<Change>, ReplicaError> {
    let all = config
        .control_nodes()
        .into_iter()
        .chain(config.data_nodes());
    let all = all.fold(NodeSet::EMPTY, NodeSet::with);
    tables.read(|cluster| {
        all.filter_map(|node| {
            let known = cluster.nodes().contains_key(&node);
            match (known, is_alive(node)) {
                (true, false) => Some(Change::Lose { node }),
                (false, true) if !cluster.has_left(node) => Some(Change::Join {
                    node,
                    domain: node.0,
                    size: size(config, node),
                }),
                _ => None,
            }
        })
        .collect()
    })
}

/// What a node has, as far as the launcher has said.
fn size(config: &BootConfig, node: NodeId) -> Share {
    let share = config.shares.get(usize::from(node.0));
    match share {
        Some(share) if !config.control_nodes().contains(node) => {
            Share::new(config.places(node), share.room)
        }
        _ => Share::NONE,
    }
}
