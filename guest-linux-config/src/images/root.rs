//! Root file systems as region files: a header in the first 2 MiB, then
//! ext4, made to be mapped by the guest as persistent memory with DAX.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vmm_shared::region::{CONTENT_OFFSET, RegionHeader, RegionKind};
use zerocopy::IntoBytes;

use super::apt::Apt;
use super::cache::{Cache, key};
use super::program::{FAKECHROOT, FAKEROOT, MMDEBSTRAP, NEWUIDMAP, SH, program};
use super::{Progress, Stage};
use crate::ImageError;
use crate::error::io_error;

/// Changes when what is made from the same package list does.
const RECIPE: &str = "debian root 1";
/// Beyond what Debian calls essential.
const PACKAGES: [&str; 24] = [
    "bash",
    "binutils",
    "coreutils",
    "dash",
    "findutils",
    "gawk",
    "gcc",
    "grep",
    "gzip",
    "iproute2",
    "kmod",
    "less",
    "libc6-dev",
    "make",
    "passwd",
    "procps",
    "psmisc",
    "python3",
    "sed",
    "strace",
    "stress-ng",
    "tar",
    "time",
    "util-linux",
];
/// Not needed to run programs, and a third of the bytes.
const LEFT_OUT: [&str; 4] = [
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
];
/// mmdebstrap takes these from the host; the guest has its own.
const SET_UP: &str = "echo viaduct >\"$1/etc/hostname\"; \
    printf '127.0.0.1 localhost viaduct\\n::1 localhost\\n' >\"$1/etc/hosts\"; \
    : >\"$1/etc/resolv.conf\"; \
    rm -rf \"$1\"/var/cache/apt/*.bin \"$1\"/var/log/*.log";
/// Unpacks the tree $1 into $2 and makes it the file system at offset $4 of
/// the file $3, $5 KiB long. No journal: the image is never written to.
/// Blocks of a page and no 64-byte descriptors: what DAX and Linux since 4.0
/// can map.
const MAKE_EXT4: &str = "set -e; mkdir \"$2\"; \
    tar -xf \"$1\" -C \"$2\" --numeric-owner --exclude='./dev/*'; \
    mke2fs -q -F -t ext4 -b 4096 -m 0 -i 8192 -L viaduct-root \
    -O ^has_journal,^resize_inode -E \"offset=$4,root_owner=0:0\" -d \"$2\" \"$3\" \"$5k\"; \
    rm -rf \"$2\"";

/// Length of the region file for a file system of `bytes`.
#[must_use]
pub fn region_len(bytes: u64) -> u64 {
    // A PCI window has a power of two of bytes.
    (CONTENT_OFFSET + bytes).next_power_of_two()
}

/// The Debian root, from the cache or made anew.
pub(crate) fn debian_root(cache: &Cache, progress: &Progress) -> Result<PathBuf, ImageError> {
    let inputs = format!("{PACKAGES:?}{LEFT_OUT:?}{SET_UP}{MAKE_EXT4}");
    let name = format!(
        "debian-root-{}.img",
        key(&[RECIPE.as_bytes(), inputs.as_bytes()])
    );
    cache.entry(&name, progress, |new| build(new, progress))
}

fn build(new: &Path, progress: &Progress) -> Result<(), ImageError> {
    // Told at once, not after minutes of work.
    MMDEBSTRAP.check()?;
    program("mke2fs", "e2fsprogs").check()?;
    let root = is_root()?;
    if !root {
        FAKEROOT.check()?;
        // mmdebstrap needs one of the two to act as root in the tree.
        NEWUIDMAP
            .check()
            .or_else(|error| FAKECHROOT.check().map_err(|_| error))?;
    }
    let scratch = new.with_file_name("scratch");
    fs::create_dir(&scratch).map_err(io_error("can't make", &scratch))?;
    let tree = scratch.join("root.tar");
    progress(
        Stage::DebianRoot,
        "installing Debian packages (about a minute)",
    );
    // Fetches package lists of its own, so any view of the sources will do.
    let (suite, sources) = Apt::with(&scratch, |apt| {
        Ok((apt.suite().to_owned(), apt.sources().to_owned()))
    })?;
    bootstrap(&suite, &sources, &tree)?;

    progress(Stage::DebianRoot, "making the root file system");
    let packed = fs::metadata(&tree)
        .map_err(io_error("can't read", &tree))?
        .len();
    // An eighth and some for blocks partly filled, and for inodes.
    let total = region_len(packed + packed / 8 + (32 << 20));
    let content = total - CONTENT_OFFSET;
    let file = File::create_new(new)
        .and_then(|_| File::options().read(true).write(true).open(new))
        .map_err(io_error("can't make", new))?;
    file.set_len(total)
        .map_err(io_error("can't make room for", new))?;
    let mut make = if root {
        SH.command()
    } else {
        // Files keep their owners, though we may not give them away.
        let mut make = FAKEROOT.command();
        make.arg("--").arg(SH.name);
        make
    };
    make.args(["-c", MAKE_EXT4, "make-ext4"])
        .arg(&tree)
        .arg(scratch.join("tree"))
        .arg(new)
        .arg(CONTENT_OFFSET.to_string())
        .arg((content / 1024).to_string());
    let maker = if root { SH } else { FAKEROOT };
    maker.output(&mut make)?;
    check_ext4(&file, CONTENT_OFFSET, new)?;
    write_header(&file, content).map_err(io_error("can't write", new))?;
    file.set_len(total).map_err(io_error("can't write", new))
}

fn bootstrap(suite: &str, sources: &Path, tree: &Path) -> Result<(), ImageError> {
    let mut command = MMDEBSTRAP.command();
    command
        .args(["--quiet", "--variant=minbase", "--format=tar"])
        .arg("--architectures=amd64")
        .arg(format!("--include={}", PACKAGES.join(",")))
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .arg(format!("--customize-hook={SET_UP}"));
    for path in LEFT_OUT {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    command.arg(suite).arg(tree).arg(sources);
    MMDEBSTRAP.output(&mut command)?;
    Ok(())
}

fn is_root() -> Result<bool, ImageError> {
    let id = program("id", "coreutils");
    let output = id.output(id.command().arg("-u"))?;
    Ok(output.trim_ascii() == b"0")
}

fn write_header(region: &File, content: u64) -> io::Result<()> {
    let header = RegionHeader::new(RegionKind::Image, [0; 16], 0, content);
    region.write_all_at(header.as_bytes(), 0)
}

/// Refuses what the guest can't mount read-only with DAX. Offsets are those
/// of ext4's super block, 1024 bytes into the file system.
fn check_ext4(file: &File, offset: u64, path: &Path) -> Result<(), ImageError> {
    const INCOMPAT_RECOVER: u8 = 4;
    const COMPAT_EXTENTS: u8 = 0x40;
    let mut block = [0; 1024];
    let refuse = |found| {
        Err(ImageError::Root {
            path: path.to_path_buf(),
            found,
        })
    };
    match file.read_exact_at(&mut block, offset + 1024) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return refuse("a file too short for a file system");
        }
        Err(error) => return Err(io_error("can't read", path)(error)),
    }
    if block[0x38..0x3a] != [0x53, 0xef] {
        return refuse("a file without ext4's magic number");
    }
    if block[0x60] & COMPAT_EXTENTS == 0 {
        return refuse("ext2 or ext3");
    }
    if block[0x18..0x1c] != [2, 0, 0, 0] {
        return refuse("ext4 with another block size");
    }
    if block[0x60] & INCOMPAT_RECOVER != 0 {
        return refuse("one that was not unmounted cleanly (run e2fsck -f on it)");
    }
    Ok(())
}

/// Writes the raw ext4 image at `root` as a region into the empty file
/// `region`, and returns the region's length. Runs of zeros become holes.
///
/// # Errors
/// If `root` is no ext4 file system that a guest can mount, or on I/O errors.
pub(crate) fn write_root_region(root: &Path, region: &File) -> Result<u64, ImageError> {
    const CHUNK: usize = 1 << 20;
    let cannot_read = io_error("can't read the root image", root);
    let cannot_write = io_error("can't write the region of", root);
    let mut source = File::open(root).map_err(&cannot_read)?;
    let metadata = source.metadata().map_err(&cannot_read)?;
    if !metadata.is_file() {
        return Err(ImageError::Root {
            path: root.to_path_buf(),
            found: "something that is no plain file",
        });
    }
    check_ext4(&source, 0, root)?;
    // Whole large pages, so that the guest's mapping can use them.
    let content = metadata.len().next_multiple_of(CONTENT_OFFSET);
    let total = region_len(content);
    region.set_len(total).map_err(&cannot_write)?;
    let mut chunk = vec![0; CHUNK];
    let mut at = CONTENT_OFFSET;
    let end = CONTENT_OFFSET + content;
    while at < end {
        let len = read_full(&mut source, &mut chunk).map_err(&cannot_read)?;
        if len == 0 {
            break;
        }
        for piece in chunk[..len].chunks(4096) {
            if piece.iter().any(|byte| *byte != 0) {
                region.write_all_at(piece, at).map_err(&cannot_write)?;
            }
            at += piece.len() as u64;
        }
    }
    write_header(region, content).map_err(&cannot_write)?;
    Ok(total)
}

fn read_full(source: &mut File, chunk: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < chunk.len() {
        match source.read(&mut chunk[len..]) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make_ext4(path: &Path, arguments: &[&str]) {
        let mke2fs = program("mke2fs", "e2fsprogs");
        let mut command = mke2fs.command();
        command
            .args(["-q", "-F"])
            .args(arguments)
            .arg(path)
            .arg("9m");
        mke2fs.output(&mut command).expect("made");
    }

    #[test]
    fn a_users_image_becomes_a_region() {
        let directory = tempfile::TempDir::new().expect("temporary directory");
        let root = directory.path().join("root.ext4");
        make_ext4(&root, &["-t", "ext4", "-b", "4096"]);
        let region = tempfile::tempfile().expect("temporary file");
        let total = write_root_region(&root, &region).expect("written");
        assert_eq!(total, 16 << 20);
        assert_eq!(region.metadata().expect("open").len(), total);

        let mut header = [0; size_of::<RegionHeader>()];
        region.read_exact_at(&mut header, 0).expect("there");
        let expected = RegionHeader::new(RegionKind::Image, [0; 16], 0, 10 << 20);
        assert_eq!(header, expected.as_bytes());
        let original = fs::read(&root).expect("there");
        let mut copy = vec![0; original.len()];
        region
            .read_exact_at(&mut copy, CONTENT_OFFSET)
            .expect("there");
        assert!(copy == original);
    }

    #[test]
    fn what_is_no_root_is_refused() {
        let directory = tempfile::TempDir::new().expect("temporary directory");
        let path = directory.path().join("image");
        let region = tempfile::tempfile().expect("temporary file");
        let refused = || {
            write_root_region(&path, &region)
                .expect_err("no root")
                .to_string()
        };

        assert!(refused().contains("can't read the root image"));
        fs::write(&path, "text").expect("written");
        assert!(refused().contains("too short"));
        fs::write(&path, [0; 10_000]).expect("written");
        assert!(refused().contains("magic"));
        make_ext4(&path, &["-t", "ext2", "-b", "4096"]);
        assert!(refused().contains("ext2"));
        make_ext4(&path, &["-t", "ext4", "-b", "1024"]);
        assert!(refused().contains("block size"));
    }

    #[test]
    fn a_region_is_a_power_of_two() {
        assert_eq!(region_len(2 << 20), 4 << 20);
        assert_eq!(region_len((2 << 20) + 1), 8 << 20);
    }
}
