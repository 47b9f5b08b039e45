//! Memory: mmap and its family.

use linux_raw_sys::general::{
    MADV_DONTNEED, MADV_FREE, MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_GROWSDOWN,
    MAP_PRIVATE, MAP_SHARED, MAP_SHARED_VALIDATE, MREMAP_FIXED, MREMAP_MAYMOVE, MS_ASYNC,
    MS_INVALIDATE, MS_SYNC, PROT_EXEC, PROT_READ, PROT_WRITE, RLIMIT_AS, RLIMIT_DATA,
};

use super::low;
use crate::errno::{Errno, Outcome, Result};
use crate::fs::{MEMORY_DEVICE, setup};
use crate::kernel::Kernel;
use crate::mem::page_up;
use crate::mem::regions::{Backing, Prot, Purpose, Region, Sharing};
use crate::process::files::{Device, Object};
use crate::wait::Tid;

/// The kinds of mappings.
const KIND: u32 = 0xf;

fn prot(flags: u32) -> Result<Prot> {
    const KNOWN: u32 = PROT_READ | PROT_WRITE | PROT_EXEC;
    if flags & !KNOWN != 0 {
        return Err(Errno::EINVAL);
    }
    let [bits, ..] = flags.to_le_bytes();
    Ok(Prot::from_bits_truncate(bits))
}

impl Kernel {
    pub(crate) fn brk(&mut self, tid: Tid, end: u64) -> Outcome {
        let limit = self.process_of(tid).limits[RLIMIT_DATA as usize].0;
        let (objects, space) = self.memory_of(tid).ok_or(Errno::ESRCH)?;
        let heap = space.heap();
        if end.saturating_sub(heap.0) > limit {
            return Ok(heap.1);
        }
        Ok(space.set_heap_end(objects, end))
    }

    pub(crate) fn mmap(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        let [wanted, len, protection, flags, number, offset] = a;
        let (flags, number) = (low(flags), low(number));
        let prot = prot(low(protection))?;
        if len == 0 || !offset.is_multiple_of(4096) {
            return Err(Errno::EINVAL.into());
        }
        let len = page_up(len).ok_or(Errno::ENOMEM)?;
        let sharing = match flags & KIND {
            MAP_PRIVATE => Sharing::Private,
            MAP_SHARED | MAP_SHARED_VALIDATE => Sharing::Shared,
            _ => return Err(Errno::EINVAL.into()),
        };
        let fixed = flags & (MAP_FIXED | MAP_FIXED_NOREPLACE) != 0;
        if fixed && !wanted.is_multiple_of(4096) {
            return Err(Errno::EINVAL.into());
        }
        self.check_memory()?;
        let limit = self.process_of(tid).limits[RLIMIT_AS as usize].0;
        let backing = self.backing(tid, flags, number, offset, sharing, prot)?;
        let purpose = match flags & MAP_GROWSDOWN {
            0 => Purpose::Mapping,
            _ => Purpose::Stack,
        };
        let region = Region {
            end: 0,
            prot,
            sharing,
            backing,
            purpose,
        };
        let (objects, space) = self.memory_of(tid).ok_or(Errno::ESRCH)?;
        let occupied = flags & MAP_FIXED_NOREPLACE != 0
            && (space.region(wanted).is_some()
                || space
                    .next_region(wanted)
                    .is_some_and(|(start, _)| start < wanted.saturating_add(len)));
        let hint = (wanted != 0 || fixed).then_some(crate::mem::page_down(wanted));
        let mapped = if occupied {
            Err(Errno::EEXIST)
        } else if limit != u64::MAX && space.size().saturating_add(len) > limit {
            Err(Errno::ENOMEM)
        } else {
            space.map(objects, hint, fixed, len, region)
        };
        if mapped.is_err()
            && let Backing::File(node, _) = backing
        {
            self.objects.release(node);
        }
        Ok(mapped?)
    }

    /// What a mapping shows; a file is held for it.
    fn backing(
        &mut self,
        tid: Tid,
        flags: u32,
        number: u32,
        offset: u64,
        sharing: Sharing,
        prot: Prot,
    ) -> Result<Backing> {
        if flags & MAP_ANONYMOUS != 0 {
            if sharing == Sharing::Private {
                return Ok(Backing::Zeros);
            }
            return self.shared_zeros(tid);
        }
        let id = self.file_id(tid, number)?;
        let file = self.file(id);
        if !file.may_read() {
            return Err(Errno::EACCES);
        }
        if sharing == Sharing::Shared && prot.contains(Prot::WRITE) && !file.may_write() {
            return Err(Errno::EACCES);
        }
        match (&file.object, file.node()) {
            (Object::File, Some(node)) => {
                self.objects.hold(node);
                Ok(Backing::File(node, offset))
            }
            (Object::Device(Device::Zero), _) if sharing == Sharing::Private => Ok(Backing::Zeros),
            (Object::Device(Device::Zero), _) => self.shared_zeros(tid),
            _ => Err(Errno::ENODEV),
        }
    }

    /// Memory to be shared with children: a file without a name.
    fn shared_zeros(&mut self, tid: Tid) -> Result<Backing> {
        let maker = self.maker(tid);
        let node = self
            .objects
            .make(setup::file(), 0o600, MEMORY_DEVICE, maker);
        self.objects.hold(node);
        self.objects.truncate(node, i64::MAX.cast_unsigned())?;
        Ok(Backing::File(node, 0))
    }

    pub(crate) fn munmap(&mut self, tid: Tid, start: u64, len: u64) -> Outcome {
        let len = page_up(len).filter(|len| *len > 0).ok_or(Errno::EINVAL)?;
        if !start.is_multiple_of(4096) {
            return Err(Errno::EINVAL.into());
        }
        let (objects, space) = self.memory_of(tid).ok_or(Errno::ESRCH)?;
        space.unmap(objects, start, len)?;
        Ok(0)
    }

    pub(crate) fn mprotect(&mut self, tid: Tid, start: u64, len: u64, flags: u32) -> Outcome {
        let prot = prot(flags)?;
        let len = page_up(len).ok_or(Errno::ENOMEM)?;
        if !start.is_multiple_of(4096) {
            return Err(Errno::EINVAL.into());
        }
        let (objects, space) = self.memory_of(tid).ok_or(Errno::ESRCH)?;
        space.protect(objects, start, len, prot)?;
        Ok(0)
    }

    pub(crate) fn madvise(&mut self, tid: Tid, start: u64, len: u64, advice: u32) -> Outcome {
        let len = page_up(len).ok_or(Errno::EINVAL)?;
        let end = start.checked_add(len).ok_or(Errno::EINVAL)?;
        if !start.is_multiple_of(4096) {
            return Err(Errno::EINVAL.into());
        }
        let (_, space) = self.memory_of(tid).ok_or(Errno::ESRCH)?;
        // MADV_FREE may keep the contents until memory is short, or not.
        if [MADV_DONTNEED, MADV_FREE].contains(&advice) {
            let end = end.min(crate::mem::tables::USER_END);
            space.discard(start, end);
        }
        Ok(0)
    }

    /// Pages of files are the files' own: there is nothing to write.
    pub(crate) fn msync(&mut self, tid: Tid, start: u64, len: u64, flags: u32) -> Outcome {
        let len = page_up(len).ok_or(Errno::ENOMEM)?;
        let end = start.checked_add(len).ok_or(Errno::ENOMEM)?;
        let both = MS_SYNC | MS_ASYNC;
        let known = flags & !(both | MS_INVALIDATE) == 0 && flags & both != both;
        if !start.is_multiple_of(4096) || !known {
            return Err(Errno::EINVAL.into());
        }
        let (_, space) = self.memory_of(tid).ok_or(Errno::ESRCH)?;
        let mut at = start;
        while at < end {
            at = space.region(at).ok_or(Errno::ENOMEM)?.1.end;
        }
        Ok(0)
    }

    pub(crate) fn mremap(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        let [start, old, new, flags, wanted, _] = a;
        let flags = low(flags);
        let old = page_up(old).filter(|len| *len > 0).ok_or(Errno::EINVAL)?;
        let new = page_up(new).filter(|len| *len > 0).ok_or(Errno::EINVAL)?;
        let end = start.checked_add(old).ok_or(Errno::EINVAL)?;
        if !start.is_multiple_of(4096) || flags & !(MREMAP_MAYMOVE | MREMAP_FIXED) != 0 {
            return Err(Errno::EINVAL.into());
        }
        self.check_memory()?;
        let (objects, space) = self.memory_of(tid).ok_or(Errno::ESRCH)?;
        let (region_start, region) = space.region(start).ok_or(Errno::EFAULT)?;
        if region.end < end {
            return Err(Errno::EFAULT.into());
        }
        let part = Region {
            backing: match region.backing {
                Backing::Zeros => Backing::Zeros,
                Backing::File(node, offset) => Backing::File(node, offset + (start - region_start)),
            },
            ..region
        };
        let fixed = flags & MREMAP_FIXED != 0;
        if !fixed && new <= old {
            if new < old {
                space.unmap(objects, start + new, old - new)?;
            }
            return Ok(start);
        }
        let grown = Region {
            backing: match part.backing {
                Backing::Zeros => Backing::Zeros,
                Backing::File(node, offset) => Backing::File(node, offset + old),
            },
            ..part
        };
        let hold = |objects: &mut crate::fs::node::Objects| {
            if let Backing::File(node, _) = part.backing {
                objects.hold(node);
            }
        };
        let free_above = space.region(end).is_none()
            && space
                .next_region(end)
                .is_none_or(|(next, _)| next >= start.saturating_add(new));
        if !fixed && region.end == end && free_above {
            hold(objects);
            let at = space.map(objects, Some(end), false, new - old, grown)?;
            if at == end {
                return Ok(start);
            }
            space.unmap(objects, at, new - old)?;
        }
        if flags & MREMAP_MAYMOVE == 0 {
            return Err(Errno::ENOMEM.into());
        }
        let overlaps = fixed && wanted < end && start < wanted.saturating_add(new);
        if fixed && (!wanted.is_multiple_of(4096) || overlaps) {
            return Err(Errno::EINVAL.into());
        }
        hold(objects);
        let to = match space.map(objects, fixed.then_some(wanted), fixed, new, part) {
            Ok(to) => to,
            Err(errno) => {
                if let Backing::File(node, _) = part.backing {
                    objects.release(node);
                }
                return Err(errno.into());
            }
        };
        space.move_pages(start, to, old.min(new));
        space.unmap(objects, start, old)?;
        Ok(to)
    }
}
