//! Builds all images of the stock guest and prints where they are:
//! `cargo run -p guest-linux-config --example images -- AGENT`, with the
//! agent built for x86_64-unknown-linux-musl.

use std::path::Path;
use std::process::ExitCode;

use guest_linux_config::command_line::command_line;
use guest_linux_config::{ImageError, Images, KernelSource, Root};

fn main() -> ExitCode {
    let Some(agent) = std::env::args_os().nth(1) else {
        eprintln!("usage: images AGENT");
        return ExitCode::from(2);
    };
    match build(Path::new(&agent)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("images: {error}");
            ExitCode::FAILURE
        }
    }
}

fn build(agent: &Path) -> Result<(), ImageError> {
    let images = Images::open(None, |stage, text| eprintln!("{stage:?}: {text}"))?;
    let kernel = KernelSource::Debian;
    println!("kernel {}", images.kernel(&kernel)?.display());
    for root in [Root::Busybox, Root::Pmem] {
        let initramfs = images.initramfs(agent, root, &kernel)?;
        println!("initramfs-{root:?} {}", initramfs.display());
        println!("command-line-{root:?} {}", command_line(root, ""));
    }
    println!("debian-root {}", images.debian_root()?.display());
    Ok(())
}
