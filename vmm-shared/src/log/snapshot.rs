//! Copying the state to a replica that joins, or that was too slow.
//!
//! ```text
//!  joiner: want = (seq, donor), from bound, offset ──────▶ donor's tick
//!  donor:  stage ◀── part of the state at position q, then staged = (seq, joiner)
//!  joiner: copies it, looks at `staged` again, asks for the next piece
//! ```
//!
//! Both sides write only what they own: the request is in the joiner's
//! record, the pieces are on the donor's stage. A part larger than the stage
//! goes in pieces. Between parts the donor applies what comes; so the joiner
//! brings what it has up to the next part's position before it loads that
//! part (see [`StateMachine`]). From the first piece on, the joiner's position
//! counts like a member's, so that the log is kept for it as for anyone.

use alloc::vec::Vec;

use crate::sync::{Ordering, fence};

use super::Log;
use super::apply::{Limit, Stop};
use super::clock::Clock;
use super::layout::LINE;
use super::machine::StateMachine;
use super::member::{MemberId, STAGED, State, WANT};
use super::replica::{Guard, Phase, Replica, ReplicaError};
use super::roster::Roster;

/// The low byte of `want` and `staged`: no member.
const NOBODY: u64 = 0xff;

impl Log {
    /// The last request for a snapshot that `member` made, while it waits for
    /// the answer.
    pub(crate) fn wanted(&self, member: MemberId) -> Option<u64> {
        // Acquire: pairs with the Release in `ask`.
        let want = self.record(member, WANT, 0).load(Ordering::Acquire);
        (want >> 8 != 0 && want & 0xff != NOBODY).then_some(want)
    }
}

/// "There is no next part."
const LAST: u64 = u64::MAX;

// Words of the stage's first line.
const POSITION: usize = 0;
const FROM: usize = 1;
const NEXT: usize = 2;
const PART_LEN: usize = 3;
const OFFSET: usize = 4;
const PIECE_LEN: usize = 5;

/// A snapshot on its way in.
#[derive(Debug)]
pub(crate) struct Transfer {
    donor: Option<MemberId>,
    avoid: Option<MemberId>,
    seq: u64,
    asked_ns: u64,
    from: u64,
    part: Vec<u8>,
    pinned: bool,
}

impl Transfer {
    pub(crate) const fn new(seq: u64) -> Self {
        Self {
            donor: None,
            avoid: None,
            seq,
            asked_ns: 0,
            from: 0,
            part: Vec::new(),
            pinned: false,
        }
    }

    fn start_over(&mut self) {
        self.avoid = self.donor.take();
        self.from = 0;
        self.part.clear();
        self.pinned = false;
    }
}

/// A snapshot on its way out.
#[derive(Debug, Default)]
pub(crate) struct Donor {
    part: Option<Part>,
    /// The `want` that was answered last, by whom, and when.
    answered: Option<(MemberId, u64, u64)>,
}

#[derive(Debug)]
struct Part {
    member: MemberId,
    from: u64,
    position: u64,
    next: u64,
    roster: Roster,
    bytes: Vec<u8>,
}

/// The number of the last request that this slot's owners have made.
pub(crate) fn last_request(log: &Log, member: MemberId) -> u64 {
    // Relaxed: written by the owner alone, and the claim has acquired it.
    log.record(member, WANT, 0).load(Ordering::Relaxed) >> 8
}

struct Piece {
    position: u64,
    next: u64,
    part_len: usize,
    roster: Roster,
    bytes: Vec<u8>,
}

impl<S: StateMachine, C: Clock> Replica<S, C> {
    pub(crate) fn last_request(&self) -> u64 {
        last_request(&self.log, self.me)
    }

    /// One step of getting the state. `Loading` means: not there yet.
    pub(crate) fn load_step(&self, guard: &mut Guard<'_, S>) -> Result<(), ReplicaError> {
        let status = self.log.status(self.me);
        if !status.is(State::Joining, self.epoch) && !status.is(State::Live, self.epoch) {
            self.end(guard);
            return Err(ReplicaError::Ended);
        }
        if self.log.head() == 0 {
            // The log goes back to its start: replay all of it.
            self.start_at(guard, 0, Roster::default());
            self.finish(guard);
            return Ok(());
        }
        let now = self.clock.now_ns();
        let transfer = guard
            .core()
            .transfer
            .get_or_insert_with(|| Transfer::new(self.last_request()));
        let Some(donor) = transfer.donor else {
            let avoid = transfer.avoid.take();
            transfer.donor = self.pick_donor(avoid);
            if transfer.donor.is_some() {
                self.ask(transfer, now);
            }
            return Err(ReplicaError::Loading);
        };
        match self.poll_piece(transfer, donor) {
            Ok(Some(piece)) => self.take_piece(guard, piece, now),
            Ok(None) => {
                self.clock.nudge(donor);
                if now.saturating_sub(transfer.asked_ns) > self.config.lease_ns {
                    transfer.start_over();
                }
            }
            Err(()) => transfer.start_over(),
        }
        let (_, local, _) = guard.view();
        if local.phase == Phase::Loading {
            Err(ReplicaError::Loading)
        } else {
            Ok(())
        }
    }

    /// The live member that is furthest on.
    pub(crate) fn pick_donor(&self, avoid: Option<MemberId>) -> Option<MemberId> {
        self.log
            .holders()
            .filter(|&member| member != self.me && Some(member) != avoid)
            .map(|member| (self.log.applied(member), member))
            .max()
            .map(|(_, member)| member)
    }

    fn ask(&self, transfer: &mut Transfer, now_ns: u64) {
        transfer.seq += 1;
        transfer.asked_ns = now_ns;
        let donor = transfer.donor.map_or(NOBODY, MemberId::bits);
        let word = |index| self.log.record(self.me, WANT, index);
        // Relaxed, both: published by the store below.
        word(1).store(transfer.from, Ordering::Relaxed);
        word(2).store(transfer.part.len() as u64, Ordering::Relaxed);
        // Release: pairs with the Acquire in `serve`.
        word(0).store((transfer.seq << 8) | donor, Ordering::Release);
    }

    /// The piece asked for, if it is on the donor's stage; `Err` if what is
    /// there can't be used.
    fn poll_piece(&self, transfer: &Transfer, donor: MemberId) -> Result<Option<Piece>, ()> {
        let staged = self.log.record(donor, STAGED, 0);
        let wanted = (transfer.seq << 8) | self.me.bits();
        // Acquire: pairs with the Release in `put_on_stage`.
        if staged.load(Ordering::Acquire) != wanted {
            return Ok(None);
        }
        let stage = self.log.layout.stage(donor);
        let head_words = self.log.geometry().stage_head_lines() * LINE;
        // Relaxed, all: a sequence lock with `staged` as the sequence.
        let word = |index: usize| stage[index].load(Ordering::Relaxed);
        let size = |index: usize| usize::try_from(word(index)).unwrap_or(usize::MAX);
        let words: Vec<u64> = (LINE..head_words).map(word).collect();
        let (len, offset, part_len) = (size(PIECE_LEN), size(OFFSET), size(PART_LEN));
        let data = &stage[head_words..];
        let fits = word(FROM) == transfer.from
            && len <= data.len() * 8
            && offset == transfer.part.len()
            && offset.checked_add(len).is_some_and(|end| end <= part_len)
            && (len > 0 || part_len == offset);
        let used = if fits { len.div_ceil(8) } else { 0 };
        let mut bytes = Vec::with_capacity(used * 8);
        for word in &data[..used] {
            bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        bytes.truncate(len);
        let piece = Piece {
            position: word(POSITION),
            next: word(NEXT),
            part_len,
            roster: Roster::from_words(&words),
            bytes,
        };
        // Acquire: pairs with the Release fence in `put_on_stage`.
        fence(Ordering::Acquire);
        // Relaxed: ordered by the fence.
        if staged.load(Ordering::Relaxed) != wanted {
            return Ok(None);
        }
        if fits { Ok(Some(piece)) } else { Err(()) }
    }

    fn take_piece(&self, guard: &mut Guard<'_, S>, piece: Piece, now_ns: u64) {
        let Some(transfer) = &mut guard.core().transfer else {
            return;
        };
        if transfer.from == 0 && !transfer.pinned {
            // From here on the log is kept for us, if it still is now.
            self.log.set_applied(self.me, piece.position);
            transfer.pinned = true;
        }
        transfer.part.extend_from_slice(&piece.bytes);
        if transfer.part.len() < piece.part_len {
            self.ask(transfer, now_ns);
            return;
        }
        let (from, part) = (transfer.from, core::mem::take(&mut transfer.part));
        let loaded = self.load_part(guard, &piece, from, &part);
        if loaded && piece.next == LAST {
            self.finish(guard);
            return;
        }
        let Some(transfer) = &mut guard.core().transfer else {
            return;
        };
        if loaded && piece.next > from {
            transfer.from = piece.next;
            transfer.part = part;
            transfer.part.clear();
            self.ask(transfer, now_ns);
        } else {
            transfer.start_over();
        }
    }

    /// Takes in one whole part; says whether the copy is still good.
    fn load_part(&self, guard: &mut Guard<'_, S>, piece: &Piece, from: u64, part: &[u8]) -> bool {
        if from == 0 {
            self.start_at(guard, piece.position, piece.roster.clone());
        }
        let limit = Limit {
            until: piece.position,
            below: Some(from),
        };
        let loaded = guard.write(&self.clock, |core, local, seats| {
            let stop: Option<Stop> = self.apply(core, local, &seats, limit);
            stop.is_none()
                && local.applied == piece.position
                && local.machine.load(from, part).is_ok()
        });
        let (_, local, _) = guard.view();
        self.log.set_applied(self.me, local.applied);
        loaded
    }

    fn start_at(&self, guard: &mut Guard<'_, S>, position: u64, roster: Roster) {
        guard.write(&self.clock, |core, local, _| {
            core.roster = roster;
            local.machine.reset();
            local.applied = position;
        });
    }

    fn finish(&self, guard: &mut Guard<'_, S>) {
        guard.write(&self.clock, |core, local, _| {
            core.transfer = None;
            core.end = core.end.max(local.applied);
            local.phase = Phase::Running;
        });
        let (core, local, _) = guard.view();
        core.head_seen = core.head_seen.max(self.log.head());
        self.log.set_applied(self.me, local.applied);
        // Release: from here on this member counts as one that has the state,
        // with `applied` as it is now.
        let want = (self.last_request() << 8) | NOBODY;
        self.log
            .record(self.me, WANT, 0)
            .store(want, Ordering::Release);
    }

    /// Hands out the next piece to whoever asks this member for one.
    pub(crate) fn serve(&self, guard: &mut Guard<'_, S>) {
        let now = self.clock.now_ns();
        for member in self.log.members() {
            let state = self.log.status(member).state;
            if member == self.me || !matches!(state, State::Joining | State::Live) {
                continue;
            }
            let Some(want) = self.log.wanted(member) else {
                continue;
            };
            if want & 0xff != self.me.bits() {
                continue;
            }
            if let Some((last, answered, at)) = guard.core().donor.answered {
                let unread = self.log.record(last, WANT, 0).load(Ordering::Relaxed) == answered;
                // One's own answer stands; another's is left for a while.
                if unread && (last == member || now.saturating_sub(at) < self.config.lease_ns) {
                    continue;
                }
            }
            guard.core().donor.answered = Some((member, want, now));
            // Relaxed, both: `want` has published them.
            let from = self.log.record(member, WANT, 1).load(Ordering::Relaxed);
            let offset = self.log.record(member, WANT, 2).load(Ordering::Relaxed);
            self.put_on_stage(guard, member, want >> 8, from, offset);
        }
    }

    fn put_on_stage(
        &self,
        guard: &mut Guard<'_, S>,
        member: MemberId,
        seq: u64,
        from: u64,
        offset: u64,
    ) {
        let budget = self.config.part_bytes;
        guard.let_readers_in();
        let (core, local, _) = guard.view();
        if offset == 0 {
            let mut bytes = core
                .donor
                .part
                .take()
                .map_or_else(Vec::new, |old| old.bytes);
            bytes.clear();
            let next = local.machine.save(from, budget, &mut bytes);
            core.counters.parts += 1;
            core.donor.part = Some(Part {
                member,
                from,
                position: local.applied,
                next: next.unwrap_or(LAST),
                roster: core.roster.clone(),
                bytes,
            });
        }
        let head_words = self.log.geometry().stage_head_lines() * LINE;
        let stage = self.log.layout.stage(self.me);
        let room = (stage.len() - head_words) * 8;
        let staged = self.log.record(self.me, STAGED, 0);
        // Relaxed: ordered by the fence.
        staged.store(NOBODY, Ordering::Relaxed);
        // Release: whoever copies any of what follows sees that `staged` has
        // changed; pairs with the Acquire fence in `poll_piece`.
        fence(Ordering::Release);
        // Relaxed, all: published by the last store.
        let put = |index: usize, value: u64| stage[index].store(value, Ordering::Relaxed);
        let part = core.donor.part.as_ref();
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        match part.filter(|part| (part.member, part.from) == (member, from)) {
            Some(part) if offset <= part.bytes.len() => {
                let rest = &part.bytes[offset..];
                let piece = &rest[..rest.len().min(room)];
                put(POSITION, part.position);
                put(FROM, from);
                put(NEXT, part.next);
                put(PART_LEN, part.bytes.len() as u64);
                put(OFFSET, offset as u64);
                put(PIECE_LEN, piece.len() as u64);
                let slots = self.log.geometry().members;
                for (index, word) in part.roster.words()[..slots].iter().enumerate() {
                    put(LINE + index, *word);
                }
                for (index, chunk) in piece.chunks(8).enumerate() {
                    let mut bytes = [0; 8];
                    bytes[..chunk.len()].copy_from_slice(chunk);
                    put(head_words + index, u64::from_ne_bytes(bytes));
                }
            }
            // The rest of a part that is no longer here: lengths that can't
            // be make the joiner start over.
            _ => put(PIECE_LEN, u64::MAX),
        }
        // Release: the piece before its name.
        staged.store((seq << 8) | member.bits(), Ordering::Release);
    }
}
