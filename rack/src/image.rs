//! The root image as a region.
//!
//! A cached image is a file in a region's own format (header, contents, and a
//! sparse tail up to a power of two), so that nodes map it as it is. A bare
//! file system is copied into such a form first.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use vmm_shared::region::{CONTENT_OFFSET, IMAGE_VERSION, MAGIC, RegionHeader, RegionKind};
use zerocopy::FromBytes;

use crate::error::RackError;
use crate::qemu::Sharing;
use crate::region::{Region, window_len};

/// Where ext2, ext3 and ext4 keep their magic number.
const EXT_MAGIC: (u64, [u8; 2]) = (1024 + 56, [0x53, 0xef]);

/// A root image ready for a node.
#[derive(Debug)]
pub(crate) struct Image {
    pub region: Region,
    pub sharing: Sharing,
    /// Bytes of the file system.
    pub content_len: u64,
}

impl Image {
    /// Opens the image in `path`; `uuid` is the rack's.
    pub(crate) fn open(path: &Path, uuid: [u8; 16]) -> Result<Self, RackError> {
        let unreadable = |error| RackError::File {
            what: "root image",
            path: path.to_owned(),
            error,
            hint: "give \"busybox\", \"debian\" or an ext4 image to --rootfs",
        };
        let broken = |reason: &str| RackError::Image {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        let file = File::open(path).map_err(unreadable)?;
        let len = file.metadata().map_err(unreadable)?.len();
        let mut head = [0; size_of::<RegionHeader>()];
        if file.read_exact_at(&mut head, 0).is_err() {
            return Err(broken("it is too short for a file system"));
        }
        let header = RegionHeader::read_from_bytes(&head).expect("exactly its size");
        if header.magic != MAGIC {
            return Self::copy(file, len, uuid).map_err(|reason| match reason {
                CopyError::NotExt => broken("it is no ext4 file system"),
                CopyError::Io(source) => unreadable(source),
                CopyError::Rack(error) => error,
            });
        }
        if header.version != IMAGE_VERSION || header.kind != RegionKind::Image as u32 {
            return Err(broken("it was made by another version of Viaduct"));
        }
        match window_len(header.content_len) {
            Some(window) if header.content_len > 0 && window == len => Ok(Self {
                region: Region::from_file(file, len),
                sharing: Sharing::Private,
                content_len: header.content_len,
            }),
            _ => Err(broken("its length does not match its header")),
        }
    }

    /// Copies a bare file system into a region.
    fn copy(mut file: File, len: u64, uuid: [u8; 16]) -> Result<Self, CopyError> {
        let (at, expected) = EXT_MAGIC;
        let mut magic = [0; 2];
        let found = file.read_exact_at(&mut magic, at);
        if found.is_err() || magic != expected {
            return Err(CopyError::NotExt);
        }
        let content_len = len.next_multiple_of(vmm_shared::addr::LARGE_PAGE_SIZE);
        let region = Region::create(RegionKind::Image, uuid, 0, content_len)?;
        copy_sparse(&mut file, region.file())?;
        Ok(Self {
            region,
            sharing: Sharing::Shared,
            content_len,
        })
    }
}

enum CopyError {
    NotExt,
    Io(std::io::Error),
    Rack(RackError),
}

impl From<RackError> for CopyError {
    fn from(error: RackError) -> Self {
        Self::Rack(error)
    }
}

impl From<std::io::Error> for CopyError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

/// Copies what is not zero: an image is mostly free space.
fn copy_sparse(from: &mut File, to: &File) -> std::io::Result<()> {
    from.seek(SeekFrom::Start(0))?;
    let mut at = CONTENT_OFFSET;
    let mut block = vec![0; 1 << 20];
    loop {
        let count = from.read(&mut block)?;
        if count == 0 {
            return Ok(());
        }
        let bytes = &block[..count];
        if bytes.iter().any(|byte| *byte != 0) {
            to.write_all_at(bytes, at)?;
        }
        at += count as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn image(content_len: u64, window: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let header = RegionHeader::new(RegionKind::Image, [0; 16], 0, content_len);
        file.as_file()
            .write_all_at(header.as_bytes(), 0)
            .expect("writable");
        file.as_file().set_len(window).expect("sparse");
        file
    }

    fn refusal(path: &Path) -> String {
        Image::open(path, [0; 16])
            .expect_err("must be refused")
            .to_string()
    }

    #[test]
    fn a_cached_image_is_used_as_it_is() {
        let file = image(10 << 20, 16 << 20);
        let image = Image::open(file.path(), [0; 16]).expect("legal");
        assert_eq!(image.content_len, 10 << 20);
        assert_eq!(image.sharing, Sharing::Private);
    }

    #[test]
    fn a_bare_file_system_is_copied() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(3 << 20).expect("sparse");
        let (at, magic) = EXT_MAGIC;
        file.as_file().write_all_at(&magic, at).expect("writable");
        file.as_file()
            .write_all_at(b"end", (3 << 20) - 3)
            .expect("writable");
        let image = Image::open(file.path(), [0; 16]).expect("legal");
        assert_eq!(image.content_len, 4 << 20);
        let mut end = [0; 3];
        let copied = image.region.file();
        copied
            .read_exact_at(&mut end, CONTENT_OFFSET + (3 << 20) - 3)
            .expect("inside");
        assert_eq!(&end, b"end");
    }

    #[test]
    fn half_built_foreign_and_missing_images_are_refused() {
        assert!(refusal(image(10 << 20, 8 << 20).path()).contains("length"));
        assert!(refusal(image(0, 2 << 20).path()).contains("length"));
        assert!(refusal(image(u64::MAX, 2 << 20).path()).contains("length"));
        let text = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(text.path(), vec![b'x'; 5000]).expect("writable");
        assert!(refusal(text.path()).contains("no ext4"));
        std::fs::write(text.path(), "short").expect("writable");
        assert!(refusal(text.path()).contains("too short"));
        assert!(refusal(Path::new("/nonexistent/root.img")).contains("--rootfs"));
    }
}
