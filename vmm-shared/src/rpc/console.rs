//! What the launcher says to the control role, for its operators: the bodies
//! of the calls.
//!
//! ```text
//!   launcher                              control role
//!   Part(upload, 0, …) ─────────────────▶ keeps it      policies only
//!   Part(upload, 176, …) ───────────────▶
//!   Change(upload, op) ─────────────────▶ checks, appends it to the log
//!              ◀──────────────────────── Answer(verdict, job, sentence)
//! ```
//!
//! The version is the one in every message's header; layouts here change with
//! [`PROTOCOL`](super::PROTOCOL). What an operation's bytes mean is the
//! control plane's matter.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::BODY_BYTES;

/// Calls that the control role answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Method {
    /// A [`ChangeRequest`]; answered with an [`Answer`].
    Change = 1,
    /// A [`Part`]; answered with nothing.
    Part = 2,
}

impl Method {
    /// The method with this number, if there is one.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Change),
            2 => Some(Self::Part),
            _ => None,
        }
    }
}

/// Bytes of an operation.
pub const OP_BYTES: usize = 32;
/// Payload bytes in a [`Part`].
pub const PART_BYTES: usize = 176;
/// The most bytes of an upload: what a batch of the log holds.
pub const MAX_UPLOAD: usize = 3840;
/// Bytes for a sentence in an [`Answer`].
pub const SENTENCE_BYTES: usize = 184;

/// A change that an operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ChangeRequest {
    /// A number that its maker chooses; it names its upload, too.
    pub request: u64,
    /// Bytes of the upload that go with the operation; 0 if there are none.
    pub upload_len: u32,
    /// 1: only say what would come of it.
    pub dry_run: u32,
    /// The operation.
    pub op: [u8; OP_BYTES],
}

/// A part of an upload. Parts come in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Part {
    /// Of the request that it is for.
    pub request: u64,
    /// Where it belongs in the upload. At 0 a new one begins.
    pub offset: u32,
    /// Bytes in use.
    pub len: u32,
    /// The bytes.
    pub bytes: [u8; PART_BYTES],
}

/// What came of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Answer {
    /// A [`Verdict`].
    pub verdict: u32,
    /// Of a refusal: its stable number, or 0.
    pub code: u32,
    /// The job that was started or joined, or 0.
    pub job: u32,
    /// Bytes of the sentence.
    pub sentence_len: u32,
    /// Why not, in words.
    pub sentence: [u8; SENTENCE_BYTES],
}

const _: () = assert!(size_of::<ChangeRequest>() == 48);
const _: () = assert!(size_of::<Part>() == 192);
const _: () = assert!(size_of::<Answer>() == 200);
const _: () = assert!(cfg!(loom) || size_of::<Answer>() <= BODY_BYTES);

/// What came of a change, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Verdict {
    /// It took effect; of a dry run: it would.
    Applied = 1,
    /// A job does it.
    Started = 2,
    /// A job was doing just that already.
    Joined = 3,
    /// It was so already.
    Nothing = 4,
    /// It can't be, and nothing was changed.
    Refused = 5,
    /// Nobody knows: the log took it, and its answer is lost.
    Unknown = 6,
}

impl Verdict {
    /// The verdict with this number, if there is one.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Applied),
            2 => Some(Self::Started),
            3 => Some(Self::Joined),
            4 => Some(Self::Nothing),
            5 => Some(Self::Refused),
            6 => Some(Self::Unknown),
            _ => None,
        }
    }
}

impl Answer {
    /// An answer without a sentence.
    #[must_use]
    pub const fn new(verdict: Verdict, job: u32) -> Self {
        Self {
            verdict: verdict as u32,
            code: 0,
            job,
            sentence_len: 0,
            sentence: [0; SENTENCE_BYTES],
        }
    }

    /// With a refusal's number and sentence, cut to what there is room for.
    #[must_use]
    pub fn with_sentence(mut self, code: u32, sentence: &str) -> Self {
        let mut len = sentence.len().min(SENTENCE_BYTES);
        while !sentence.is_char_boundary(len) {
            len -= 1;
        }
        self.code = code;
        self.sentence[..len].copy_from_slice(&sentence.as_bytes()[..len]);
        self.sentence_len = u32::try_from(len).expect("short");
        self
    }

    /// The sentence, as far as it is one.
    #[must_use]
    pub fn sentence(&self) -> &str {
        let len = usize::try_from(self.sentence_len).unwrap_or(usize::MAX);
        let bytes = self.sentence.get(..len).unwrap_or_default();
        core::str::from_utf8(bytes).unwrap_or_default()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn sentences_are_cut_between_characters_and_garbage_is_none() {
        let long = "é".repeat(SENTENCE_BYTES);
        let answer = Answer::new(Verdict::Refused, 0).with_sentence(3, &long);
        assert_eq!(answer.sentence().len(), SENTENCE_BYTES);
        let answer = answer.with_sentence(3, &format!("x{long}"));
        assert_eq!(answer.sentence().len(), SENTENCE_BYTES - 1);
        let mut garbage = answer;
        garbage.sentence_len = u32::MAX;
        assert_eq!(garbage.sentence(), "");
        garbage.sentence_len = 2;
        assert_eq!(garbage.sentence(), "");
    }
}
