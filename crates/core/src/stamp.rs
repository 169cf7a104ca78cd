//! Whether a file is still the one that was read.

use std::fs::Metadata;
use std::time::SystemTime;

/// What tells one state of a file from another: when it was written and how long it is, and, where the system says so,
/// which file it is and when it became so. One that was put in another's place is another, however alike they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStamp {
    written: Option<SystemTime>,
    length: u64,
    which: [i64; 3],
}

// === impl FileStamp ===

impl FileStamp {
    /// The stamp of a file of which this is said.
    #[must_use]
    pub fn of(metadata: &Metadata) -> Self {
        #[cfg(unix)]
        let which = {
            use std::os::unix::fs::MetadataExt as _;
            [metadata.ino().cast_signed(), metadata.ctime(), metadata.ctime_nsec()]
        };
        #[cfg(not(unix))]
        let which = [0; 3];
        Self { written: metadata.modified().ok(), length: metadata.len(), which }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_file_in_anothers_place_is_another() {
        let folder = std::env::temp_dir().join(format!("portcullis-stamp-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (path, other) = (folder.join("a"), folder.join("b"));
        let write = |path, text: &str| {
            std::fs::write(path, text).unwrap();
            std::fs::File::options().write(true).open(path).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        };
        let stamp = || FileStamp::of(&std::fs::metadata(&path).unwrap());
        write(&path, "one");
        let before = stamp();
        assert_eq!(before, stamp());
        write(&other, "two");
        std::fs::rename(&other, &path).unwrap();
        let after = stamp();
        assert_eq!((before.written, before.length), (after.written, after.length));
        assert_ne!(before, after);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
