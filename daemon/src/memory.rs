//! What a daemon at rest does without: memory that builds have left in the allocator, and program text that nobody runs.

use std::fs;
use std::time::Duration;

use crate::builds::Builds;
use crate::session::file_sync::FileCache;

/// How long no build runs before memory is given back: many builds come right after one another.
const REST: Duration = Duration::from_secs(1);
/// How long files of clients stay open beyond that: to read a long list of them again takes a moment.
const KEEP_OPEN: Duration = Duration::from_secs(4);
/// How long after that threads without work and what builds have told are gone as well.
const AFTERMATH: Duration = Duration::from_secs(10);

/// Gives memory back whenever builds have come to an end, and once after the start.
pub(crate) async fn keep_small(builds: Builds, files: FileCache) {
    at_rest(builds, || async {
        give_back_soon().await;
        tokio::time::sleep(KEEP_OPEN).await;
        close_files(&files).await;
        tokio::time::sleep(AFTERMATH).await;
        give_back_soon().await;
    })
    .await;
}

/// Closes files of clients that nobody needs now, and gives back what their lists took.
pub(crate) async fn close_files(files: &FileCache) {
    let closed = files.close_unused();
    tracing::debug!(closed, "files of clients that nobody needs now are closed");
    give_back_soon().await;
}

async fn give_back_soon() {
    // A thread that cannot be had is no reason to stop.
    drop(tokio::task::spawn_blocking(give_back).await);
}

/// Does something once in every time of rest; it is broken off when a build begins.
async fn at_rest<F: Future<Output = ()>>(builds: Builds, act: impl Fn() -> F) {
    loop {
        builds.idle().await;
        if tokio::time::timeout(REST, builds.busy()).await.is_err() {
            tokio::select! {
                () = act() => builds.busy().await,
                () = builds.busy() => {}
            }
        }
    }
}

/// Gives back what is not in use. Nothing is lost: what is needed again is allocated or read again.
fn give_back() {
    trim();
    if let Some((start, end)) = text() {
        let pages = start as *mut std::ffi::c_void;
        // The kernel maps program text in larger pieces than are run, most of them once, at the start.
        // SAFETY: the pages are the program's text: private, never written, and backed by a file that stays open as long
        // as it is mapped. What is executed next is read from it again.
        #[expect(unsafe_code, reason = "there is no safe way to say that pages are not needed now")]
        let given =
            unsafe { rustix::mm::madvise(pages, end - start, rustix::mm::Advice::LinuxDontNeed) };
        if let Err(error) = given {
            tracing::debug!(%error, "the program's text stays in memory");
        }
    }
}

#[cfg(target_env = "gnu")]
fn trim() {
    // SAFETY: the function takes no pointers and may be called by any thread at any time.
    #[expect(unsafe_code, reason = "the allocator of the C library has no other interface")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Other C libraries have no such function.
#[cfg(not(target_env = "gnu"))]
fn trim() {}

/// Returns where the program's own text is mapped.
fn text() -> Option<(usize, usize)> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    find_text(&maps, give_back as *const () as usize)
}

/// Finds the mapping that holds an address, if it is text as the linker leaves it.
fn find_text(maps: &str, address: usize) -> Option<(usize, usize)> {
    maps.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let start = usize::from_str_radix(start, 16).ok()?;
        let end = usize::from_str_radix(end, 16).ok()?;
        let is_text = fields.next()? == "r-xp";
        (is_text && (start..end).contains(&address)).then_some((start, end))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const MAPS: &str = "\
        55d0c0000000-55d0c0100000 r--p 00000000 fe:00 42 /usr/bin/x\n\
        55d0c0100000-55d0c0200000 r-xp 00100000 fe:00 42 /usr/bin/x\n\
        55d0c0200000-55d0c0300000 rw-p 00200000 fe:00 42 /usr/bin/x\n";

    #[test]
    fn only_text_is_given_back() {
        let text = (0x55d0_c010_0000, 0x55d0_c020_0000);
        assert_eq!(find_text(MAPS, 0x55d0_c010_1234), Some(text));
        assert_eq!(find_text(MAPS, 0x55d0_c000_1234), None);
        assert_eq!(find_text(MAPS, 0x55d0_c020_0000), None);
        assert_eq!(find_text("", 0), None);
    }

    #[test]
    fn what_was_given_back_comes_back() {
        let data: Vec<Vec<u8>> = (0..10_000u32).map(|at| at.to_le_bytes().repeat(100)).collect();
        let (kept, gone): (Vec<_>, Vec<_>) =
            data.into_iter().enumerate().partition(|(at, _)| at % 100 == 0);
        drop(gone);
        let (start, end) = text().unwrap();
        assert!(end - start > 1 << 16);
        give_back();
        for (at, bytes) in kept {
            assert_eq!(bytes[..4], u32::try_from(at).unwrap().to_le_bytes());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn memory_is_given_back_after_builds_and_not_between() {
        let builds = Builds::default();
        let times = Arc::new(AtomicUsize::new(0));
        let counted = times.clone();
        let resting = tokio::spawn(at_rest(builds.clone(), move || {
            counted.fetch_add(1, Ordering::Relaxed);
            std::future::ready(())
        }));
        let times = || times.load(Ordering::Relaxed);
        tokio::time::sleep(REST * 3).await;
        assert_eq!(times(), 1, "after the start");
        for id in ["a", "b", "c"] {
            let running = builds.start(id).unwrap();
            tokio::time::sleep(REST * 3).await;
            drop(running);
            tokio::time::sleep(REST / 2).await;
            assert_eq!(times(), 1, "between builds");
        }
        tokio::time::sleep(REST * 3).await;
        assert_eq!(times(), 2, "after the last one");
        resting.abort();
    }
}
