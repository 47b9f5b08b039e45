//! Guests as an operator runs them: one command in a VM on two nodes, with the
//! programs that it needs as its input.

use std::fs::File;
use std::io::{Seek, copy};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result};

use crate::child;
use crate::console::{Outcome, Watch};
use crate::images::{BenchImages, utf8};
use crate::system::Guest;

/// Runs the measurements in a guest that `viaduct run --guest` knows.
pub(crate) fn run(kind: &str, guest: &Guest, images: &BenchImages) -> Result<Outcome> {
    const NODES: u32 = 2;
    let mut input = tempfile::tempfile()?;
    let mut append = |path: &Path| {
        let mut file =
            File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        copy(&mut file, &mut input).context("cannot copy the guest's programs")
    };
    let length = append(&images.program)?;
    append(&images.busybox)?;
    input.rewind()?;
    // The time first, as the copies are none of the boot's.
    let script = format!(
        "read booted rest </proc/uptime; cd /tmp && head -c {length} >bench && cat >/bin/busybox && \
         chmod +x bench /bin/busybox && booted=$booted suite=pv exec ./bench"
    );
    let viaduct = rack::beside_executable("release/viaduct");
    let arguments = format!(
        "run --guest {kind} --nodes {NODES} --cores {} --vcpus {} --memory {}M -- sh -c",
        guest.vcpus / NODES,
        guest.vcpus,
        guest.memory.0 >> 20
    );
    let arguments = arguments.split(' ').map(str::to_owned);
    let watch = Watch::new(guest.verbose, Vec::new);
    child::follow(
        utf8(&viaduct)?,
        arguments.chain([script]),
        Stdio::from(input),
        watch,
    )
}
