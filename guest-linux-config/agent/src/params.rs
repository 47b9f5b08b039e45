//! The agent's words on the kernel command line.

/// Where the root file system is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Root {
    /// `viaduct.root=busybox`: the initial RAM file system is all there is.
    #[default]
    Busybox,
    /// `viaduct.root=pmem`: ext4 on the first persistent memory device.
    Pmem,
    /// `viaduct.root=ready`: the kernel has mounted everything.
    Ready,
}

/// What to print for benchmarks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Bench {
    /// Nothing.
    #[default]
    No,
    /// `viaduct.bench`: the time at which this program started.
    Yes,
    /// `viaduct.bench=boot`: that, and switch off at once.
    Boot,
}

/// All of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Params {
    pub(crate) root: Root,
    pub(crate) bench: Bench,
}

impl Params {
    /// Reads a kernel command line; words of others are passed over, and so
    /// are values that this program does not know.
    pub(crate) fn parse(command_line: &[u8]) -> Self {
        let mut params = Self::default();
        for word in command_line.split(u8::is_ascii_whitespace) {
            match word {
                b"viaduct.root=busybox" => params.root = Root::Busybox,
                b"viaduct.root=pmem" => params.root = Root::Pmem,
                b"viaduct.root=ready" => params.root = Root::Ready,
                b"viaduct.bench" => params.bench = Bench::Yes,
                b"viaduct.bench=boot" => params.bench = Bench::Boot,
                _ => {}
            }
        }
        params
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_words_count_and_others_do_not() {
        assert_eq!(Params::parse(b""), Params::default());
        let params =
            Params::parse(b"quiet viaduct.root=pmem viaduct.root=tape x\xff viaduct.bench\n");
        assert_eq!((params.root, params.bench), (Root::Pmem, Bench::Yes));
        assert_eq!(Params::parse(b"viaduct.bench=boot").bench, Bench::Boot);
    }
}
