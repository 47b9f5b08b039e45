//! What goes with messages: open files and credentials.

use alloc::vec::Vec;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::errno::{Errno, Result};
use crate::kernel::Kernel;
use crate::mem::index;
use crate::process::files::{FileId, Object};
use crate::wait::Tid;

pub(super) const SOL_SOCKET: u32 = 1;
pub(super) const SCM_RIGHTS: u32 = 1;
pub(super) const SCM_CREDENTIALS: u32 = 2;
/// Most open files of one message, and bytes of what goes with it.
const MOST_FILES: usize = 253;
pub(super) const MOST_CONTROL: u64 = 1 << 12;
/// Bytes of a control message before its data.
pub(super) const CONTROL_HEAD: usize = 16;

/// A program's `struct msghdr`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Header {
    pub(super) name: u64,
    pub(super) name_len: u64,
    pub(super) pieces: u64,
    pub(super) count: u64,
    pub(super) control: u64,
    pub(super) control_len: u64,
    pub(super) flags: u64,
}

impl Kernel {
    /// The open files in the control messages of a program.
    pub(super) fn control_files(&mut self, tid: Tid, header: &Header) -> Result<Vec<FileId>> {
        let mut files = Vec::new();
        if header.control == 0 || header.control_len == 0 {
            return Ok(files);
        }
        if header.control_len > MOST_CONTROL {
            return Err(Errno::EINVAL);
        }
        let control = self.bytes(tid, header.control, index(header.control_len))?;
        for number in control_descriptors(&control)? {
            let id = self.file_id(tid, number)?;
            self.sockets.fly |= matches!(self.file(id).object, Object::Socket(_));
            files.push(id);
        }
        if files.len() > MOST_FILES {
            return Err(Errno::EINVAL);
        }
        Ok(files)
    }

    /// A use more of open files, for a message or for who looks at it.
    pub(super) fn hold_all(&mut self, files: &[FileId]) -> Vec<FileId> {
        for file in files {
            self.hold_file(*file);
        }
        files.to_vec()
    }
}

/// Puts a control message of words behind others.
pub(super) fn put_control(into: &mut Vec<u8>, kind: u32, words: &[u32]) {
    let len = CONTROL_HEAD + words.len() * 4;
    into.extend((len as u64).to_le_bytes());
    into.extend(SOL_SOCKET.to_le_bytes());
    into.extend(kind.to_le_bytes());
    into.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    into.resize(into.len().next_multiple_of(8), 0);
}

/// The descriptors in a program's control messages.
fn control_descriptors(mut bytes: &[u8]) -> Result<Vec<u32>> {
    let mut all = Vec::new();
    while bytes.len() >= CONTROL_HEAD {
        let word = |at: usize| {
            let word = bytes[at..].first_chunk().copied().unwrap_or_default();
            u32::from_le_bytes(word)
        };
        let len = usize::try_from(word(0)).unwrap_or(usize::MAX);
        if !(CONTROL_HEAD..=bytes.len()).contains(&len) || word(4) != 0 {
            return Err(Errno::EINVAL);
        }
        match (word(8), word(12)) {
            (SOL_SOCKET, SCM_RIGHTS) => {
                all.extend(
                    (CONTROL_HEAD..len)
                        .step_by(4)
                        .filter(|at| at + 4 <= len)
                        .map(word),
                );
            }
            // The kernel fills in the truth.
            (SOL_SOCKET, SCM_CREDENTIALS) => {}
            _ => return Err(Errno::EINVAL),
        }
        bytes = bytes.get(len.next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(all)
}

/// Reads bytes as control messages.
///
/// # Panics
/// If their descriptors are more than there is room for, or aren't read again
/// as they are written.
#[cfg(any(test, fuzzing))]
pub(super) fn read_anything(bytes: &[u8]) {
    let Ok(found) = control_descriptors(bytes) else {
        return;
    };
    assert!(found.len() * 4 <= bytes.len());
    let mut written = Vec::new();
    put_control(&mut written, SCM_RIGHTS, &found);
    assert_eq!(control_descriptors(&written), Ok(found));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_messages_are_read_as_they_are_written() {
        let mut bytes = Vec::new();
        put_control(&mut bytes, SCM_CREDENTIALS, &[1, 2, 3]);
        put_control(&mut bytes, SCM_RIGHTS, &[7, 8, 9]);
        assert_eq!(bytes.len(), 64);
        assert_eq!(control_descriptors(&bytes), Ok(vec![7, 8, 9]));
        assert_eq!(control_descriptors(&bytes[..60]), Ok(vec![7, 8, 9]));
        assert_eq!(control_descriptors(&bytes[..59]), Err(Errno::EINVAL));
        bytes[0] = 15;
        assert_eq!(control_descriptors(&bytes), Err(Errno::EINVAL));
        assert_eq!(control_descriptors(&[0xff; 24]), Err(Errno::EINVAL));
    }
}
