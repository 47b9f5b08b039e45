//! Programs' memory, as system calls use it. Every access is checked; a bad
//! address is `EFAULT`.

use alloc::vec;
use alloc::vec::Vec;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::errno::{Errno, Result};
use crate::fs::walk::PATH_LIMIT;
use crate::kernel::Kernel;
use crate::mem::{PAGE, index};
use crate::wait::Tid;

/// Most pieces of one readv or writev.
const MOST_PIECES: u64 = 1024;
/// Most bytes of one read or write.
pub(crate) const MOST_BYTES: u64 = 0x7fff_f000;

impl Kernel {
    /// Copies a thread's memory.
    pub(crate) fn read_user(&mut self, tid: Tid, address: u64, into: &mut [u8]) -> Result<()> {
        let (objects, space) = self.memory_of(tid).ok_or(Errno::EFAULT)?;
        space.read(objects, address, into)
    }

    /// Changes a thread's memory.
    pub(crate) fn write_user(&mut self, tid: Tid, address: u64, from: &[u8]) -> Result<()> {
        let (objects, space) = self.memory_of(tid).ok_or(Errno::EFAULT)?;
        space.write(objects, address, from)
    }

    /// A value in a thread's memory.
    pub(crate) fn get<T: FromBytes + IntoBytes>(&mut self, tid: Tid, address: u64) -> Result<T> {
        let mut value = T::new_zeroed();
        self.read_user(tid, address, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Stores a value in a thread's memory.
    pub(crate) fn put<T: IntoBytes + Immutable>(
        &mut self,
        tid: Tid,
        address: u64,
        value: &T,
    ) -> Result<()> {
        self.write_user(tid, address, value.as_bytes())
    }

    /// The same, unless the address is 0.
    pub(crate) fn put_if<T: IntoBytes + Immutable>(
        &mut self,
        tid: Tid,
        address: u64,
        value: &T,
    ) -> Result<()> {
        match address {
            0 => Ok(()),
            _ => self.put(tid, address, value),
        }
    }

    /// A string that a zero byte ends, without it.
    pub(crate) fn string(&mut self, tid: Tid, address: u64, limit: usize) -> Result<Vec<u8>> {
        let mut text = Vec::new();
        while text.len() < limit {
            let at = address
                .checked_add(text.len() as u64)
                .ok_or(Errno::EFAULT)?;
            // To the end of the page: what is behind it may not be there.
            let rest = PAGE - index(at % PAGE as u64);
            let mut piece = [0; 256];
            let piece = &mut piece[..rest.min(256).min(limit - text.len())];
            self.read_user(tid, at, piece)?;
            if let Some(end) = piece.iter().position(|byte| *byte == 0) {
                text.extend_from_slice(&piece[..end]);
                return Ok(text);
            }
            text.extend_from_slice(piece);
        }
        Err(Errno::ENAMETOOLONG)
    }

    /// A path.
    pub(crate) fn path(&mut self, tid: Tid, address: u64) -> Result<Vec<u8>> {
        self.string(tid, address, PATH_LIMIT)
    }

    /// A list of strings that ends with a null pointer, of at most `limit`
    /// bytes in all; each with its zero byte.
    pub(crate) fn strings(&mut self, tid: Tid, address: u64, limit: usize) -> Result<Vec<Vec<u8>>> {
        let mut all = Vec::new();
        let mut left = limit;
        if address == 0 {
            return Ok(all);
        }
        loop {
            let at = address.checked_add(all.len() as u64 * 8);
            let pointer: u64 = self.get(tid, at.ok_or(Errno::EFAULT)?)?;
            if pointer == 0 {
                return Ok(all);
            }
            let text = self
                .string(tid, pointer, left)
                .map_err(|errno| match errno {
                    Errno::ENAMETOOLONG => Errno::E2BIG,
                    other => other,
                })?;
            left = left.checked_sub(text.len() + 9).ok_or(Errno::E2BIG)?;
            all.push(text);
        }
    }

    /// The pieces of a readv or writev: addresses and lengths.
    pub(crate) fn pieces(&mut self, tid: Tid, address: u64, count: u64) -> Result<Vec<(u64, u64)>> {
        if count > MOST_PIECES {
            return Err(Errno::EINVAL);
        }
        let mut pieces = Vec::new();
        let mut room = MOST_BYTES;
        for number in 0..count {
            let at = address.checked_add(number * 16).ok_or(Errno::EFAULT)?;
            let [base, len]: [u64; 2] = self.get(tid, at)?;
            if len > i64::MAX.cast_unsigned() {
                return Err(Errno::EINVAL);
            }
            let len = len.min(room);
            room -= len;
            if len > 0 {
                pieces.push((base, len));
            }
        }
        Ok(pieces)
    }

    /// Bytes of a thread's memory; at most a page of a time is asked for.
    pub(crate) fn bytes(&mut self, tid: Tid, address: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read_user(tid, address, &mut bytes)?;
        Ok(bytes)
    }
}
