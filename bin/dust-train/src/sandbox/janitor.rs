//! Clears up after a process that could not: a shell that waits for our end, however it comes,
//! and then removes the cgroups and scratch folders that bear our process number. The warm
//! interpreters see to themselves: they leave, boxes and all, when their control stream ends.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use std::os::unix::process::CommandExt;

/// What every cgroup and scratch folder of this process is called, up to a number.
pub(super) fn prefix() -> String {
    format!("dust-sandbox-{}-", std::process::id())
}

/// Reads to the end of its input, which comes when nobody holds the other end any more.
const SCRIPT: &str = r#"
prefix=$1; shift
cat >/dev/null
tries=0
while [ $tries -lt 100 ]; do
    left=
    for parent in "$@"; do
        for folder in "$parent/$prefix"*; do
            [ -d "$folder" ] || continue
            case $folder in
                /sys/fs/cgroup/*) rmdir "$folder" 2>/dev/null ;;
                *) chmod -R u+rwX "$folder" 2>/dev/null; rm -rf "$folder" 2>/dev/null ;;
            esac
            [ -d "$folder" ] && left=1
        done
    done
    [ $left ] || exit 0
    tries=$((tries + 1))
    sleep 0.05
done
"#;

/// Starts it, once for the process; it cleans below `parents`. Without a shell there is none.
pub(super) fn start<'a>(parents: impl Iterator<Item = &'a Path>) {
    static JANITOR: OnceLock<Option<Child>> = OnceLock::new();
    JANITOR.get_or_init(|| {
        Command::new("/bin/sh")
            .args(["-c", SCRIPT, "sh", &prefix()])
            .args(parents)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Not in the foreground: Ctrl-C is not meant for it.
            .process_group(0)
            .spawn()
            .ok()
    });
}
