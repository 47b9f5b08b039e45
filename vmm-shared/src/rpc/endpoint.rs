//! One node's side of its calls.

use zerocopy::IntoBytes;

use super::message::{BODY_BYTES, Header, Kind, PROTOCOL, Request, body_len, decode, encode};
use super::queue::{MESSAGE_WORDS, Producer, Queue, QueueError};
use super::wait::{Doorbell, Waiter};

/// A call that was made. Each number is used once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallId(u64);

/// Why a callee did not carry out a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(pub u32);

impl Refused {
    /// The callee does not know the method.
    pub const NO_SUCH_METHOD: Self = Self(1);
    /// The arguments are none for this method.
    pub const BAD_ARGUMENTS: Self = Self(2);
    /// The callee has no time for it now.
    pub const BUSY: Self = Self(3);
}

/// Why a call could not be made or answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RpcError {
    /// As many calls are outstanding as this endpoint can have.
    TooManyCalls,
    /// This endpoint has no way to that peer.
    NoSuchPeer,
    /// The body does not fit a message.
    TooLong,
    /// The peer's inbox would not take the message.
    Queue(QueueError),
}

/// How a call stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallResult {
    /// No answer yet.
    Pending,
    /// Answered; so many bytes of the buffer are the answer.
    Answered(usize),
    /// Refused by the peer.
    Refused(Refused),
    /// No answer in time. It may be carried out all the same.
    TimedOut,
    /// No such call: its result was taken, or it was cancelled.
    Unknown,
}

/// What has come to an endpoint that was no use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Messages that are none, or of another version.
    pub garbage: u64,
    /// Messages of incarnations that are no members.
    pub stale: u64,
    /// Answers to no call, or from another than the called peer.
    pub unasked: u64,
}

#[derive(Clone, Copy, Debug)]
struct Call {
    id: CallId,
    peer: usize,
    deadline_ns: u64,
    /// `Unknown` while the entry is free.
    result: CallResult,
    body: [u8; BODY_BYTES],
}

const NO_CALL: Call = Call {
    id: CallId(0),
    peer: 0,
    deadline_ns: 0,
    result: CallResult::Unknown,
    body: [0; BODY_BYTES],
};

/// A node's inbox, its ways to `PEERS` peers, and up to `CALLS` outstanding
/// calls. One thread uses it at a time.
pub struct Endpoint<D, const PEERS: usize, const CALLS: usize> {
    inbox: Queue,
    peers: [Option<Producer>; PEERS],
    calls: [Call; CALLS],
    next_call: u64,
    epoch: u32,
    bell: D,
    waiter: Waiter,
    dropped: Dropped,
}

impl<D: Doorbell, const PEERS: usize, const CALLS: usize> Endpoint<D, PEERS, CALLS> {
    /// An endpoint with this inbox, for the incarnation `epoch` of its node.
    #[must_use]
    pub fn new(inbox: Queue, epoch: u32, bell: D) -> Self {
        Self {
            inbox,
            peers: [const { None }; PEERS],
            calls: [NO_CALL; CALLS],
            // Answers to an earlier incarnation's calls are not for us.
            next_call: u64::from(epoch) << 32,
            epoch,
            bell,
            waiter: Waiter::default(),
            dropped: Dropped::default(),
        }
    }

    /// Sets or removes the way to `peer`: this node's producer in its inbox.
    ///
    /// # Errors
    /// If there can't be so many peers.
    pub fn set_peer(&mut self, peer: usize, way: Option<Producer>) -> Result<(), RpcError> {
        *self.peers.get_mut(peer).ok_or(RpcError::NoSuchPeer)? = way;
        Ok(())
    }

    /// What was dropped so far.
    #[must_use]
    pub const fn dropped(&self) -> &Dropped {
        &self.dropped
    }

    fn send(&mut self, peer: usize, header: &Header, body: &[u8]) -> Result<(), RpcError> {
        let message = encode(header, body).ok_or(RpcError::TooLong)?;
        let way = self
            .peers
            .get_mut(peer)
            .and_then(Option::as_mut)
            .ok_or(RpcError::NoSuchPeer)?;
        way.send(&message).map_err(RpcError::Queue)?;
        if way.queue().wants_a_ring() {
            self.bell.ring(peer);
        }
        Ok(())
    }

    const fn header(&self, kind: Kind, call: u64, method: u32, status: u32) -> Header {
        Header {
            version: PROTOCOL,
            kind: kind as u16,
            epoch: self.epoch,
            call,
            method,
            len: 0,
            status,
            reserved: 0,
        }
    }

    /// Calls a peer, without waiting. The answer has to be there at
    /// `deadline_ns` of the caller's clock.
    ///
    /// # Errors
    /// If the call could not be sent; nothing was then.
    pub fn call(
        &mut self,
        peer: usize,
        method: u32,
        body: &[u8],
        deadline_ns: u64,
    ) -> Result<CallId, RpcError> {
        let index = self
            .calls
            .iter()
            .position(|call| call.result == CallResult::Unknown)
            .ok_or(RpcError::TooManyCalls)?;
        let id = CallId(self.next_call);
        let header = self.header(Kind::Request, id.0, method, 0);
        self.send(peer, &header, body)?;
        self.next_call = self.next_call.wrapping_add(1);
        self.calls[index] = Call {
            id,
            peer,
            deadline_ns,
            result: CallResult::Pending,
            ..NO_CALL
        };
        Ok(id)
    }

    /// How a call stands at `now_ns`. An end is told once; the answer is put
    /// into `answer`, as far as it fits.
    pub fn result(&mut self, id: CallId, now_ns: u64, answer: &mut [u8]) -> CallResult {
        let found = self
            .calls
            .iter_mut()
            .find(|call| call.id == id && call.result != CallResult::Unknown);
        let Some(call) = found else {
            return CallResult::Unknown;
        };
        let result = match call.result {
            CallResult::Pending if now_ns < call.deadline_ns => return CallResult::Pending,
            CallResult::Pending => CallResult::TimedOut,
            CallResult::Answered(len) => {
                let len = len.min(answer.len());
                answer[..len].copy_from_slice(&call.body[..len]);
                CallResult::Answered(len)
            }
            other => other,
        };
        call.result = CallResult::Unknown;
        result
    }

    /// Gives a call up. The peer is told, if its inbox has room; it may have
    /// carried the call out already. A late answer is dropped.
    pub fn cancel(&mut self, id: CallId) {
        let found = self
            .calls
            .iter_mut()
            .find(|call| call.id == id && call.result != CallResult::Unknown);
        if let Some(call) = found {
            let (peer, pending) = (call.peer, call.result == CallResult::Pending);
            call.result = CallResult::Unknown;
            if pending {
                let header = self.header(Kind::Cancel, id.0, 0, 0);
                let _ = self.send(peer, &header, &[]);
            }
        }
    }

    /// Takes in messages until one is for the caller to act on: a request, or
    /// a cancellation of one. `is_member` says whether an incarnation of a
    /// peer is one to listen to; see the log's membership.
    pub fn poll(&mut self, is_member: impl Fn(usize, u32) -> bool) -> Option<(Kind, Request)> {
        let mut message = [0; MESSAGE_WORDS];
        // Bounded: a peer that floods us must not keep us here for ever.
        for _ in 0..1024 {
            let peer = match self.inbox.receive(&mut message) {
                Ok(None) => return None,
                Ok(Some(peer)) => peer,
                Err(QueueError::Garbage { .. }) => {
                    self.dropped.garbage += 1;
                    continue;
                }
                Err(_) => {
                    self.dropped.garbage += 1;
                    return None;
                }
            };
            let Some((kind, request)) = decode(peer, &message) else {
                self.dropped.garbage += 1;
                continue;
            };
            if !is_member(peer, request.header.epoch) {
                self.dropped.stale += 1;
                continue;
            }
            match kind {
                Kind::Request | Kind::Cancel => return Some((kind, request)),
                Kind::Reply => self.complete(&request, None),
                Kind::Refusal => self.complete(&request, Some(Refused(request.header.status))),
            }
        }
        None
    }

    fn complete(&mut self, reply: &Request, refused: Option<Refused>) {
        let id = CallId(reply.header.call);
        let found = self.calls.iter_mut().find(|call| {
            call.id == id && call.peer == reply.peer && call.result == CallResult::Pending
        });
        match (found, body_len(&reply.header)) {
            (Some(call), Some(len)) => {
                call.body[..len].copy_from_slice(reply.body());
                call.result = refused.map_or(CallResult::Answered(len), CallResult::Refused);
            }
            _ => self.dropped.unasked += 1,
        }
    }

    /// Answers a request.
    ///
    /// # Errors
    /// If the answer could not be sent; it may be tried again.
    pub fn answer(&mut self, request: &Request, body: &[u8]) -> Result<(), RpcError> {
        let header = self.header(Kind::Reply, request.header.call, request.header.method, 0);
        self.send(request.peer, &header, body)
    }

    /// Answers a request with a value of fixed layout.
    ///
    /// # Errors
    /// As for [`answer`](Self::answer).
    pub fn answer_with<T>(&mut self, request: &Request, value: &T) -> Result<(), RpcError>
    where
        T: IntoBytes + zerocopy::Immutable,
    {
        self.answer(request, value.as_bytes())
    }

    /// Refuses a request.
    ///
    /// # Errors
    /// As for [`answer`](Self::answer).
    pub fn refuse(&mut self, request: &Request, why: Refused) -> Result<(), RpcError> {
        let Header { call, method, .. } = request.header;
        let header = self.header(Kind::Refusal, call, method, why.0);
        self.send(request.peer, &header, &[])
    }

    /// Wants to be rung for messages from now on: for a receiver that sleeps in
    /// its own way. False if there is one already.
    #[must_use]
    pub fn rest(&self) -> bool {
        self.inbox.may_sleep()
    }

    /// Waits for messages, polling first and then sleeping, for about
    /// `timeout_ns` at most; says whether there are some.
    pub fn wait(&mut self, timeout_ns: u64) -> bool {
        self.waiter.wait(&self.inbox, &self.bell, timeout_ns)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::queue::QueueSizes;
    use super::*;
    use crate::shm::testing::leaked;
    use core::cell::Cell;

    #[derive(Default)]
    struct CountingBell {
        rings: Cell<u32>,
        sleeps: Cell<u32>,
    }

    impl Doorbell for &CountingBell {
        fn ring(&self, _: usize) {
            self.rings.set(self.rings.get() + 1);
        }
        fn sleep(&self, _: u64) {
            self.sleeps.set(self.sleeps.get() + 1);
        }
    }

    type TestEndpoint<'a> = Endpoint<&'a CountingBell, 2, 4>;

    fn pair(bell: &CountingBell) -> [TestEndpoint<'_>; 2] {
        let sizes = QueueSizes {
            slots: 16,
            producers: 2,
            cells: 8,
        };
        let inbox = || {
            let memory = leaked(sizes.total_bytes().div_ceil(64));
            Queue::create(memory, sizes).expect("large enough")
        };
        let inboxes = [inbox(), inbox()];
        [0, 1].map(|me: usize| {
            let mut endpoint = Endpoint::new(inboxes[me].clone(), 1, bell);
            for (peer, queue) in inboxes.iter().enumerate() {
                let way = queue.producer(me).expect("two producers");
                endpoint.set_peer(peer, Some(way)).expect("two peers");
            }
            endpoint
        })
    }

    fn anyone(_: usize, _: u32) -> bool {
        true
    }

    #[test]
    fn several_calls_are_answered_in_any_order() {
        let bell = CountingBell::default();
        let [mut a, mut b] = pair(&bell);
        let first = a.call(1, 7, b"one", 100).expect("room");
        let second = a.call(1, 8, b"two", 100).expect("room");
        let requests: Vec<_> = std::iter::from_fn(|| b.poll(anyone)).collect();
        assert_eq!(requests.len(), 2);
        for (kind, request) in requests.iter().rev() {
            assert_eq!(*kind, Kind::Request);
            let mut body = request.body().to_vec();
            body.push(b'0' + u8::try_from(request.header.method).expect("small"));
            b.answer(request, &body).expect("room");
        }
        let mut answer = [0; 8];
        assert_eq!(a.result(first, 50, &mut answer), CallResult::Pending);
        assert!(a.poll(anyone).is_none());
        assert_eq!(a.result(first, 50, &mut answer), CallResult::Answered(4));
        assert_eq!(&answer[..4], b"one7");
        assert_eq!(a.result(second, 500, &mut answer), CallResult::Answered(4));
        assert_eq!(&answer[..4], b"two8");
        assert_eq!(a.result(second, 50, &mut answer), CallResult::Unknown);
    }

    #[test]
    fn one_that_rests_is_rung_and_one_with_mail_does_not_rest() {
        let bell = CountingBell::default();
        let [mut a, mut b] = pair(&bell);
        a.call(1, 7, &[], 100).expect("room");
        assert_eq!(bell.rings.get(), 0, "nobody has asked for it");
        assert!(!b.rest(), "there is one");
        assert!(b.poll(anyone).is_some());
        assert!(b.rest());
        a.call(1, 8, &[], 100).expect("room");
        assert_eq!(bell.rings.get(), 1);
    }

    #[test]
    fn time_outs_cancellations_and_refusals_free_their_calls() {
        let bell = CountingBell::default();
        let [mut a, mut b] = pair(&bell);
        let late = a.call(1, 1, &[], 100).expect("room");
        let cancelled = a.call(1, 2, &[], 100).expect("room");
        let refused = a.call(1, 3, &[], 100).expect("room");
        let last = a.call(1, 4, &[], 100).expect("room");
        assert_eq!(a.call(1, 5, &[], 100), Err(RpcError::TooManyCalls));
        a.cancel(cancelled);
        let requests: Vec<_> = std::iter::from_fn(|| b.poll(anyone)).collect();
        assert_eq!(requests.last().map(|(kind, _)| *kind), Some(Kind::Cancel));
        assert_eq!(a.result(late, 100, &mut []), CallResult::TimedOut);
        b.refuse(&requests[2].1, Refused::BUSY).expect("room");
        // Answers to the call that timed out and to the cancelled one.
        b.answer(&requests[0].1, b"late").expect("room");
        b.answer(&requests[1].1, b"late").expect("room");
        assert!(a.poll(anyone).is_none());
        assert_eq!(a.dropped().unasked, 2);
        assert_eq!(
            a.result(refused, 50, &mut []),
            CallResult::Refused(Refused::BUSY)
        );
        assert_eq!(a.result(last, 50, &mut []), CallResult::Pending);
    }

    #[test]
    fn garbage_strangers_and_other_versions_are_dropped() {
        let bell = CountingBell::default();
        let [mut a, mut b] = pair(&bell);
        let way = a.peers[1].as_mut().expect("set");
        way.send(&[u64::MAX; MESSAGE_WORDS]).expect("room");
        let good = b.header(Kind::Request, 1, 1, 0);
        let bad = [
            Header { version: 2, ..good },
            Header { kind: 9, ..good },
            Header {
                kind: Kind::Reply as u16,
                ..good
            },
        ];
        for header in bad {
            let message = encode(&header, &[]).expect("short");
            way.send(&message).expect("room");
        }
        let mut message = encode(&good, &[]).expect("short");
        message[2] = (u64::MAX << 32) | 1;
        way.send(&message).expect("room");
        assert!(b.poll(anyone).is_none());
        a.call(1, 1, &[], 100).expect("room");
        assert!(b.poll(|_, epoch| epoch == 2).is_none());
        let dropped = Dropped {
            garbage: 4,
            stale: 1,
            unasked: 1,
        };
        assert_eq!(b.dropped(), &dropped);
        assert_eq!(a.call(9, 1, &[], 0), Err(RpcError::NoSuchPeer));
        assert_eq!(a.call(1, 1, &[0; 300], 0), Err(RpcError::TooLong));
    }

    #[test]
    fn a_sleeper_is_rung_for_and_one_awake_is_not() {
        let bell = CountingBell::default();
        let [mut a, mut b] = pair(&bell);
        a.call(1, 1, &[], 100).expect("room");
        assert_eq!(bell.rings.get(), 0);
        assert!(b.wait(1_000), "a message is there");
        assert_eq!(bell.sleeps.get(), 0);
        while b.poll(anyone).is_some() {}
        assert!(!b.wait(1_000));
        assert_eq!(bell.sleeps.get(), 1);
        assert!(b.inbox.may_sleep());
        a.call(1, 1, &[], 100).expect("room");
        assert_eq!(bell.rings.get(), 1);
        assert!(!b.inbox.may_sleep(), "the message came before the sleep");
        let before = b.waiter.polls();
        for _ in 0..20 {
            b.wait(1);
        }
        assert!(b.waiter.polls() > before);
    }
}
