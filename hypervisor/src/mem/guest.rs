//! Access to guest physical memory by its address.

use vmm_shared::addr::Gpa;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// An access that is not, or not all, inside guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestMemoryError {
    /// First byte of the access.
    pub gpa: Gpa,
    /// Bytes of the access.
    pub len: usize,
}

/// The guest's RAM, addressed as the guest addresses it.
///
/// Other vCPUs may write the same bytes at any time, so all access is by copy
/// and no reference into guest memory exists.
pub trait GuestMemory {
    /// Copies bytes out of guest memory.
    ///
    /// # Errors
    /// If any byte of the range is not guest memory.
    fn read_bytes(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), GuestMemoryError>;

    /// Copies bytes into guest memory.
    ///
    /// # Errors
    /// If any byte of the range is not guest memory; nothing is written then.
    fn write_bytes(&self, gpa: Gpa, from: &[u8]) -> Result<(), GuestMemoryError>;

    /// The same, but never waits for another node.
    ///
    /// # Errors
    /// As [`write_bytes`](Self::write_bytes), and if this node would have to
    /// ask first.
    fn write_bytes_now(&self, gpa: Gpa, from: &[u8]) -> Result<(), GuestMemoryError> {
        self.write_bytes(gpa, from)
    }

    /// A copy of the fixed-layout value at `gpa`.
    ///
    /// # Errors
    /// As [`read_bytes`](Self::read_bytes).
    fn read<T: FromBytes + IntoBytes>(&self, gpa: Gpa) -> Result<T, GuestMemoryError>
    where
        Self: Sized,
    {
        let mut value = T::new_zeroed();
        self.read_bytes(gpa, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Stores a fixed-layout value at `gpa`.
    ///
    /// # Errors
    /// As [`write_bytes`](Self::write_bytes).
    fn write<T: IntoBytes + Immutable>(&self, gpa: Gpa, value: &T) -> Result<(), GuestMemoryError>
    where
        Self: Sized,
    {
        self.write_bytes(gpa, value.as_bytes())
    }
}
