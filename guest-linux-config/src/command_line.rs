//! The guest kernel's command line, and the reason for each word.

use crate::Root;

/// The words that every guest gets, each with its reason.
pub const DEFAULT_WORDS: [(&str, &str); 7] = [
    (
        "console=ttyS0",
        "the 8250 is built in; a virtio console would come too late for early messages",
    ),
    (
        "quiet",
        "each character printed is an exit or two: a verbose boot spends most of its time there",
    ),
    (
        "tsc=reliable",
        "the hypervisor keeps all nodes' counters in step; the kernel need not watch or compare them",
    ),
    (
        "8250.nr_uarts=1",
        "the kernel would probe three more ports that nothing answers",
    ),
    (
        "memhp_default_state=online_movable",
        "memory that is added is used without a helper in the guest, and for nothing that could not be moved away when it is to go again",
    ),
    (
        "swiotlb=noforce",
        "with addresses for memory to come above 4 GiB the kernel would keep 64 MiB for devices that can't reach them; ours can",
    ),
    (
        "panic=-1",
        "a kernel that has panicked restarts at once, which the launcher sees and reports",
    ),
];

/// The default command line for a root, with `extra` words behind it: of
/// words that contradict each other the kernel takes the last.
#[must_use]
pub fn command_line(root: Root, extra: &str) -> String {
    let mut words: Vec<&str> = DEFAULT_WORDS.iter().map(|(word, _)| *word).collect();
    // Read by the agent, not by the kernel.
    words.push(match root {
        Root::Busybox => "viaduct.root=busybox",
        Root::Pmem => "viaduct.root=pmem",
    });
    // Not taken apart: a value in quotes may hold spaces.
    words.extend(Some(extra.trim()).filter(|extra| !extra.is_empty()));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extra_words_come_last() {
        let line = command_line(Root::Pmem, " quiet=0 a=\"b  c\"\n");
        assert!(line.starts_with("console=ttyS0 quiet tsc=reliable"));
        assert!(line.ends_with(" viaduct.root=pmem quiet=0 a=\"b  c\""));
        assert!(command_line(Root::Busybox, "").ends_with(" viaduct.root=busybox"));
    }
}
