//! Making an emulator forget what it has translated from a frame.

use core::sync::atomic::Ordering;

use crate::addr::PAGE_SIZE;
use crate::shm::SharedMem;

/// Stores every word of the frame at `offset` of `memory` over itself; `None`
/// if the frame is not all inside or not aligned.
///
/// An emulator drops its translations of a word when the word is stored to by
/// its own guest. A compare-and-exchange of the value for itself is such a
/// store, and one that can't undo what another CPU stores at the same time. (An
/// atomic addition of nothing would read nicer, but compilers make a fence and
/// a load of that, which drops no translation.)
#[must_use = "nothing was refreshed if this is None"]
pub fn refresh(memory: &SharedMem, offset: usize) -> Option<()> {
    let len = usize::try_from(PAGE_SIZE).ok()?;
    let frame = memory.window(offset, len)?;
    for at in (0..len).step_by(8) {
        let word = frame.atomic_u64(at)?;
        let mut value = word.load(Ordering::Relaxed);
        // Relaxed: no word orders another; the entry's lock orders them all.
        // A failure means that a CPU has just stored here; one that stores for
        // ever is this node's own, for which the emulator keeps track itself.
        for _ in 0..16 {
            match word.compare_exchange(value, value, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => value = now,
            }
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::testing::leaked;

    #[test]
    fn bytes_stay_what_they_are_and_outside_is_refused() {
        let memory = leaked(8192 / 64);
        let data: Vec<u8> = (0..8192_usize).map(|i| (i % 251) as u8).collect();
        memory.write_bytes(0, &data).expect("fits");
        refresh(&memory, 4096).expect("inside");
        let mut back = vec![0; 8192];
        memory.read_bytes(0, &mut back).expect("fits");
        assert_eq!(back, data);
        assert_eq!(refresh(&memory, 4104), None);
        assert_eq!(refresh(&memory, 4097), None);
        assert_eq!(refresh(&memory, usize::MAX), None);
    }

    #[test]
    fn no_increment_of_another_cpu_is_lost() {
        let memory = leaked(4096 / 64);
        let counted = std::thread::scope(|scope| {
            let writer = scope.spawn(move || {
                let word = memory.atomic_u64(2048).expect("inside");
                for _ in 0..20_000 {
                    word.fetch_add(1, Ordering::Relaxed);
                }
            });
            while !writer.is_finished() {
                refresh(&memory, 0).expect("inside");
            }
            memory
                .atomic_u64(2048)
                .expect("inside")
                .load(Ordering::Relaxed)
        });
        assert_eq!(counted, 20_000);
    }
}
