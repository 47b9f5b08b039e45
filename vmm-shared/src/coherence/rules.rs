//! What becomes of an entry when a node faults on it: the whole policy, as a
//! function without memory.

use super::entry::{History, State};
use super::rights::{Access, Rights};

/// A frame that flipped between Data and Code this often …
pub const FLIP_LIMIT: u32 = 4;
/// … within this many grants that changed something begins to roam.
pub const FLIP_WINDOW: u32 = u8::BITS;
/// After this many moves, a roaming frame that was only ever fetched, or
/// never, settles again.
pub const MOVE_WINDOW: u8 = 7;

/// What a grant changed, for counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing: another core of the node was first, or the node had dropped
    /// the mapping.
    Regrant,
    /// The unit was Unmapped: it is Private now.
    FirstTouch,
    /// One more node shares it, or a sharer uses a right it had not used yet.
    Join,
    /// The second node came: Private to Data.
    SharedAsData,
    /// The second node came: Private to Code.
    SharedAsCode,
    /// Code to Data.
    CodeToData,
    /// Data to Code.
    DataToCode,
    /// Nobody else is left: Private again.
    Alone,
    /// The frame began to roam.
    Roam,
    /// A roaming frame moved.
    Move,
    /// A roaming frame settled as Data or Code.
    Settle,
}

/// The entry as the holder of its lock sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Situation {
    pub(super) state: State,
    pub(super) history: History,
    /// Other living nodes may hold rights.
    pub(super) others: bool,
    /// This node may hold rights.
    pub(super) mapped: bool,
    /// This node must refresh before it executes; so it can't hold Execute.
    pub(super) stale: bool,
    pub(super) piece: bool,
    pub(super) access: Access,
}

/// What to do about a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Split the piece, then look at the frame.
    Split,
    /// Bring the entry into this state.
    Become(Plan),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) state: State,
    pub(super) history: History,
    /// What the other nodes may keep; `None` if they need not be asked.
    pub(super) keep: Option<Rights>,
    /// What this node gets.
    pub(super) rights: Rights,
    pub(super) change: Change,
}

/// Decides on a fault. The plan's rights always include what the access needs.
pub(super) fn decide(now: Situation) -> Verdict {
    let executes = now.access == Access::Execute;
    // A refresh is done under the entry's lock: 4 KiB of it, never 2 MiB.
    if now.piece && now.stale && executes {
        return Verdict::Split;
    }
    if !now.others {
        return Verdict::Become(alone(now));
    }
    match (now.state, now.access) {
        (State::Data, Access::Execute) | (State::Code, Access::Write) => disagree(now),
        (State::Data, _) => Verdict::Become(join(now, Rights::READ_WRITE)),
        (State::Code, _) => Verdict::Become(join(now, usable(now, Rights::READ_EXECUTE))),
        (State::Roaming, _) => Verdict::Become(roam(now)),
        // Unmapped with sharers is what a node leaves that dies early in its
        // first touch; a Split entry never gets here.
        (State::Private | State::Unmapped | State::Split, _) => Verdict::Become(share(now)),
    }
}

/// `rights`, but without Execute if that would cost a refresh that this
/// access doesn't need.
fn usable(now: Situation, rights: Rights) -> Rights {
    if now.stale && now.access != Access::Execute {
        rights & Rights::READ_WRITE
    } else {
        rights
    }
}

fn alone(now: Situation) -> Plan {
    let (state, change) = match (now.state, now.mapped) {
        (State::Private, true) => (State::Private, Change::Regrant),
        (State::Roaming, true) => (State::Roaming, Change::Regrant),
        (State::Unmapped, _) => (State::Private, Change::FirstTouch),
        _ => (State::Private, Change::Alone),
    };
    Plan {
        state,
        history: now.history,
        keep: None,
        rights: usable(now, Rights::ALL),
        change,
    }
}

fn join(now: Situation, rights: Rights) -> Plan {
    let news = !now.mapped || (now.stale && now.access == Access::Execute);
    Plan {
        state: now.state,
        history: if news {
            grown(now.history, false)
        } else {
            now.history
        },
        keep: None,
        rights,
        change: if news { Change::Join } else { Change::Regrant },
    }
}

fn share(now: Situation) -> Plan {
    let (state, change) = match now.access {
        Access::Execute => (State::Code, Change::SharedAsCode),
        Access::Read | Access::Write => (State::Data, Change::SharedAsData),
    };
    Plan {
        state,
        history: grown(now.history, false),
        keep: Some(state.rights()),
        rights: state.rights(),
        change,
    }
}

fn disagree(now: Situation) -> Verdict {
    if now.piece {
        return Verdict::Split;
    }
    let history = grown(now.history, true);
    Verdict::Become(if history.flips.count_ones() >= FLIP_LIMIT {
        Plan {
            state: State::Roaming,
            history: History::default(),
            keep: Some(Rights::NONE),
            rights: usable(now, Rights::ALL),
            change: Change::Roam,
        }
    } else {
        let (state, change) = match now.access {
            Access::Execute => (State::Code, Change::DataToCode),
            Access::Read | Access::Write => (State::Data, Change::CodeToData),
        };
        Plan {
            state,
            history,
            // Who wrote may go on reading, and who executed too; the next
            // thing they do about it tells what they are.
            keep: Some(Rights::READ),
            rights: state.rights(),
            change,
        }
    })
}

fn roam(now: Situation) -> Plan {
    let history = History {
        flips: 0,
        moves: now.history.moves + 1,
        wrote: now.history.wrote || now.access == Access::Write,
        executed: now.history.executed || now.access == Access::Execute,
    };
    if history.moves < MOVE_WINDOW {
        return Plan {
            state: State::Roaming,
            history,
            keep: Some(Rights::NONE),
            rights: usable(now, Rights::ALL),
            change: Change::Move,
        };
    }
    match (history.wrote, history.executed) {
        (true, true) => Plan {
            state: State::Roaming,
            history: History::default(),
            keep: Some(Rights::NONE),
            rights: usable(now, Rights::ALL),
            change: Change::Move,
        },
        (false, true) => settle(now, State::Code),
        (_, false) => settle(now, State::Data),
    }
}

fn settle(now: Situation, state: State) -> Plan {
    Plan {
        state,
        history: History::default(),
        keep: Some(state.rights()),
        rights: usable(now, state.rights()),
        change: Change::Settle,
    }
}

/// The history after one more grant that changed something.
fn grown(history: History, flip: bool) -> History {
    History {
        flips: history.flips << 1 | u8::from(flip),
        ..history
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 6] = [
        State::Unmapped,
        State::Data,
        State::Code,
        State::Private,
        State::Roaming,
        State::Split,
    ];
    const ACCESSES: [Access; 3] = [Access::Read, Access::Write, Access::Execute];

    fn all_situations() -> impl Iterator<Item = Situation> {
        STATES.into_iter().flat_map(|state| {
            ACCESSES.into_iter().flat_map(move |access| {
                (0..1_usize << 15).map(move |bits| {
                    let bit = |at: usize| bits >> at & 1 != 0;
                    Situation {
                        state,
                        history: History {
                            flips: (bits >> 7 & 0xff) as u8,
                            moves: (bits >> 4 & 7).min(6) as u8,
                            wrote: bit(5),
                            executed: bit(6),
                        },
                        others: bit(0),
                        mapped: bit(1),
                        stale: bit(2),
                        piece: bit(3),
                        access,
                    }
                })
            })
        })
    }

    #[test]
    fn every_plan_serves_the_access_and_conflicts_with_nobody() {
        for now in all_situations() {
            let Verdict::Become(plan) = decide(now) else {
                assert!(now.piece, "only pieces split");
                continue;
            };
            assert!(
                plan.rights.contains(now.access.needs()),
                "{now:?}\n{plan:?}"
            );
            assert!(
                plan.state.rights().contains(plan.rights),
                "{now:?}\n{plan:?}"
            );
            // A read comes free with every other right.
            assert!(plan.rights.contains(Rights::READ));
            assert!(!matches!(plan.state, State::Split | State::Unmapped));
            assert!(plan.history.moves < MOVE_WINDOW);
            if !now.others {
                assert_eq!(plan.keep, None);
                continue;
            }
            let theirs = match plan.keep {
                Some(keep) => keep,
                None => now.state.rights(),
            };
            assert!(plan.state.rights().contains(theirs), "{now:?}\n{plan:?}");
            let conflict =
                |a: Rights, b: Rights| a.contains(Rights::WRITE) && b.contains(Rights::EXECUTE);
            assert!(
                !conflict(theirs, plan.rights) && !conflict(plan.rights, theirs),
                "{now:?}\n{plan:?}"
            );
            if matches!(plan.state, State::Private | State::Roaming) {
                assert_eq!(theirs, Rights::NONE, "{now:?}\n{plan:?}");
            }
        }
    }

    #[test]
    fn a_stale_node_gets_execute_only_if_it_executes() {
        for now in all_situations().filter(|now| now.stale && now.access != Access::Execute) {
            if let Verdict::Become(plan) = decide(now) {
                assert!(!plan.rights.contains(Rights::EXECUTE), "{now:?}\n{plan:?}");
            }
        }
    }

    #[test]
    fn turns_lead_to_roaming_and_peace_leads_out_of_it() {
        let mut now = Situation {
            state: State::Data,
            history: History::default(),
            others: true,
            mapped: true,
            stale: false,
            piece: false,
            access: Access::Execute,
        };
        let mut seen = Vec::new();
        for turn in 0..30 {
            let Verdict::Become(plan) = decide(now) else {
                panic!("frames do not split");
            };
            seen.push(plan.change);
            now.state = plan.state;
            now.history = plan.history;
            now.access = match (turn < 11, now.access) {
                (true, Access::Execute) | (false, _) => Access::Write,
                (true, _) => Access::Execute,
            };
        }
        assert_eq!(
            seen[..3],
            [Change::DataToCode, Change::CodeToData, Change::DataToCode]
        );
        assert_eq!(seen[3], Change::Roam);
        // Seven moves with both kinds change nothing; after seven for writes
        // alone it is data, for good.
        assert!(seen[4..17].iter().all(|change| *change == Change::Move));
        assert_eq!(seen[17], Change::Settle);
        assert_eq!(now.state, State::Data);
        assert!(seen[18..].iter().all(|change| *change == Change::Regrant));
    }

    #[test]
    fn a_frame_read_by_many_between_flips_never_roams() {
        let mut history = History::default();
        for _ in 0..100 {
            history = grown(history, true);
            for _ in 0..2 {
                history = grown(history, false);
            }
            assert!(history.flips.count_ones() < FLIP_LIMIT);
        }
    }
}
