//! Extended attributes: no file system here has any.

use crate::errno::{Errno, Outcome};
use crate::fs::walk::Last;
use crate::kernel::Kernel;
use crate::wait::Tid;

/// What is done with the attributes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extended {
    /// All names: none.
    List,
    /// One that is named at this address: not to be had.
    One(u64),
}

/// Longest name.
const LONGEST: usize = 255;

impl Kernel {
    pub(super) fn path_extended(
        &mut self,
        tid: Tid,
        path: u64,
        last: Last,
        what: Extended,
    ) -> Outcome {
        let path = self.path(tid, path)?;
        self.resolve(tid, &path, last)?.found.ok_or(Errno::ENOENT)?;
        self.no_attributes(tid, what)
    }

    pub(super) fn file_extended(&mut self, tid: Tid, number: u32, what: Extended) -> Outcome {
        self.file_id(tid, number)?;
        self.no_attributes(tid, what)
    }

    fn no_attributes(&mut self, tid: Tid, what: Extended) -> Outcome {
        let Extended::One(name) = what else {
            return Ok(0);
        };
        match self.string(tid, name, LONGEST + 1) {
            Ok(name) if name.is_empty() => Err(Errno::ERANGE.into()),
            Ok(_) => Err(Errno::EOPNOTSUPP.into()),
            Err(Errno::ENAMETOOLONG) => Err(Errno::ERANGE.into()),
            Err(errno) => Err(errno.into()),
        }
    }
}
