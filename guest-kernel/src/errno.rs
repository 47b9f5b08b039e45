//! Error numbers, and how a system call can end.

use linux_raw_sys::errno;

/// A Linux error number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) u32);

macro_rules! errors {
    ($($name:ident)*) => {
        impl Errno {
            $(pub(crate) const $name: Self = Self(errno::$name);)*
        }
    };
}

errors! {
    E2BIG EACCES EAFNOSUPPORT EAGAIN EBADF ECHILD EEXIST EFAULT EINTR EINVAL EIO EISDIR ELOOP
    EMFILE ENAMETOOLONG ENODEV ENOENT ENOEXEC ENOMEM ENOSPC ENOSYS ENOTCONN
    ENOTDIR ENOTEMPTY ENOTSOCK ENOTTY ENXIO EOPNOTSUPP EPERM EPIPE ERANGE ESPIPE ESRCH
    ETIMEDOUT EXDEV EFBIG EBUSY EOVERFLOW EADDRINUSE EADDRNOTAVAIL ECONNREFUSED
    ECONNRESET EDEADLK EDESTADDRREQ EINPROGRESS EISCONN EMSGSIZE ENETUNREACH ENOPROTOOPT
    EPROTONOSUPPORT ESOCKTNOSUPPORT
}

pub(crate) type Result<T, E = Errno> = core::result::Result<T, E>;

/// Why a system call has no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It has failed.
    Failed(Errno),
    /// It must wait; the thread's queues are set.
    Block,
    /// The thread's registers are as they must be: it has a new program, has
    /// returned from a signal's handler, or has ended.
    Done,
}

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Self {
        Self::Failed(errno)
    }
}

/// A system call's result.
pub(crate) type Outcome = core::result::Result<u64, Stop>;
