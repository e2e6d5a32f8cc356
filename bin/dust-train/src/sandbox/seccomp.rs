//! The system calls that a program may make.
//!
//! Three filters are stacked and the kernel takes the strictest answer. An allow-list answers
//! `EPERM` to the rest, so that a library that probes for a feature carries on without it; calls
//! that no honest program makes kill; `clone3`, whose flags no filter can read, is answered
//! `ENOSYS`, at which libc falls back to `clone`, whose flags we check. A foreign ABI kills.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use libc::c_long;
use seccompiler::{
    SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Allowed whatever their arguments.
#[rustfmt::skip]
const ALLOWED: &[c_long] = &[
    // files and descriptors; Landlock decides on the paths
    libc::SYS_read, libc::SYS_write, libc::SYS_readv, libc::SYS_writev, libc::SYS_pread64,
    libc::SYS_pwrite64, libc::SYS_preadv, libc::SYS_pwritev, libc::SYS_preadv2, libc::SYS_pwritev2,
    libc::SYS_close, libc::SYS_close_range, libc::SYS_lseek, libc::SYS_fstat, libc::SYS_newfstatat,
    libc::SYS_statx, libc::SYS_statfs, libc::SYS_fstatfs, libc::SYS_openat, libc::SYS_openat2,
    libc::SYS_flock, libc::SYS_fsync, libc::SYS_fdatasync, libc::SYS_ftruncate, libc::SYS_truncate,
    libc::SYS_fallocate, libc::SYS_getdents64, libc::SYS_getcwd, libc::SYS_chdir, libc::SYS_fchdir,
    libc::SYS_mkdirat, libc::SYS_unlinkat, libc::SYS_renameat2, libc::SYS_linkat,
    libc::SYS_symlinkat, libc::SYS_readlinkat, libc::SYS_faccessat, libc::SYS_faccessat2,
    libc::SYS_copy_file_range, libc::SYS_sendfile, libc::SYS_fadvise64, libc::SYS_umask,
    libc::SYS_dup, libc::SYS_dup3, libc::SYS_pipe2, libc::SYS_ppoll, libc::SYS_pselect6,
    libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_eventfd2,
    libc::SYS_timerfd_create, libc::SYS_timerfd_settime, libc::SYS_timerfd_gettime,
    libc::SYS_signalfd4,
    // memory
    libc::SYS_mmap, libc::SYS_munmap, libc::SYS_mremap, libc::SYS_mprotect, libc::SYS_madvise,
    libc::SYS_brk, libc::SYS_msync, libc::SYS_mincore,
    // processes and threads; execve can reach nothing but the read-only system, see `landlock`
    libc::SYS_execve, libc::SYS_exit, libc::SYS_exit_group, libc::SYS_wait4, libc::SYS_waitid,
    libc::SYS_getpid, libc::SYS_getppid, libc::SYS_gettid, libc::SYS_getpgid, libc::SYS_getsid,
    libc::SYS_getuid, libc::SYS_geteuid, libc::SYS_getgid, libc::SYS_getegid, libc::SYS_getresuid,
    libc::SYS_getresgid, libc::SYS_getgroups, libc::SYS_capget, libc::SYS_getpriority,
    libc::SYS_getrusage, libc::SYS_times, libc::SYS_sched_yield, libc::SYS_sched_getaffinity,
    libc::SYS_sched_getscheduler, libc::SYS_sched_getparam, libc::SYS_futex,
    libc::SYS_set_robust_list, libc::SYS_get_robust_list, libc::SYS_set_tid_address, libc::SYS_rseq,
    libc::SYS_membarrier, libc::SYS_getcpu, libc::SYS_restart_syscall,
    // time
    libc::SYS_clock_gettime, libc::SYS_clock_getres, libc::SYS_clock_nanosleep, libc::SYS_nanosleep,
    libc::SYS_gettimeofday, libc::SYS_setitimer, libc::SYS_getitimer, libc::SYS_timer_create,
    libc::SYS_timer_settime, libc::SYS_timer_gettime, libc::SYS_timer_getoverrun,
    libc::SYS_timer_delete,
    // signals
    libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigpending, libc::SYS_rt_sigtimedwait, libc::SYS_rt_sigsuspend,
    libc::SYS_sigaltstack,
    // the ends of a socket pair; no socket can be made that reaches anybody else
    libc::SYS_recvfrom, libc::SYS_sendmsg, libc::SYS_recvmsg, libc::SYS_shutdown,
    libc::SYS_getsockopt, libc::SYS_setsockopt, libc::SYS_getsockname, libc::SYS_getpeername,
    // the rest
    libc::SYS_getrandom, libc::SYS_uname, libc::SYS_sysinfo,
];

/// The older names of some of them, which newer architectures do without.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const LEGACY: &[c_long] = &[
    libc::SYS_open, libc::SYS_creat, libc::SYS_stat, libc::SYS_lstat, libc::SYS_access,
    libc::SYS_readlink, libc::SYS_unlink, libc::SYS_mkdir, libc::SYS_rmdir, libc::SYS_rename,
    libc::SYS_renameat, libc::SYS_link, libc::SYS_symlink, libc::SYS_pipe, libc::SYS_dup2,
    libc::SYS_getdents, libc::SYS_poll, libc::SYS_select, libc::SYS_epoll_create,
    libc::SYS_epoll_wait, libc::SYS_eventfd, libc::SYS_signalfd, libc::SYS_fork, libc::SYS_vfork,
    libc::SYS_time, libc::SYS_alarm, libc::SYS_pause, libc::SYS_getpgrp, libc::SYS_getrlimit,
    libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const LEGACY: &[c_long] = &[];

/// Sending signals: allowed only where something else confines them to the box.
const SIGNALLING: &[c_long] = &[
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_tgkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
];

/// No honest program makes these.
#[rustfmt::skip]
const KILLED: &[c_long] = &[
    libc::SYS_ptrace, libc::SYS_process_vm_readv, libc::SYS_process_vm_writev, libc::SYS_kcmp,
    libc::SYS_pidfd_getfd, libc::SYS_bpf, libc::SYS_perf_event_open, libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register,
    libc::SYS_keyctl, libc::SYS_add_key, libc::SYS_request_key, libc::SYS_mount, libc::SYS_umount2,
    libc::SYS_pivot_root, libc::SYS_chroot, libc::SYS_unshare, libc::SYS_setns, libc::SYS_open_tree,
    libc::SYS_move_mount, libc::SYS_fsopen, libc::SYS_fsconfig, libc::SYS_fsmount, libc::SYS_fspick,
    libc::SYS_mount_setattr, libc::SYS_open_by_handle_at, libc::SYS_init_module,
    libc::SYS_finit_module, libc::SYS_delete_module, libc::SYS_kexec_load, libc::SYS_reboot,
    libc::SYS_swapon, libc::SYS_swapoff, libc::SYS_acct, libc::SYS_quotactl,
    libc::SYS_fanotify_init, libc::SYS_settimeofday, libc::SYS_clock_settime, libc::SYS_syslog,
    libc::SYS_vhangup,
];

const NAMESPACE_FLAGS: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_PTRACE) as u64;

/// The filters as the kernel takes them (arrays of `struct sock_filter`), in the order in which
/// to install them.
pub(super) fn filters(signals_confined: bool) -> Result<Vec<Vec<u8>>> {
    let errno = |e: i32| SeccompAction::Errno(e as u32);
    Ok(vec![
        compile(killed(), SeccompAction::Allow, SeccompAction::KillProcess)?,
        compile(
            BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
            SeccompAction::Allow,
            errno(libc::ENOSYS),
        )?,
        // Last, because it does not allow the installing of filters.
        compile(
            allowed(signals_confined)?,
            errno(libc::EPERM),
            SeccompAction::Allow,
        )?,
    ])
}

fn killed() -> Rules {
    KILLED.iter().map(|&n| (n, Vec::new())).collect()
}

fn allowed(signals_confined: bool) -> Result<Rules> {
    let mut rules: Rules = ALLOWED
        .iter()
        .chain(LEGACY)
        .map(|&n| (n, Vec::new()))
        .collect();
    // The filter above answers it; here it must not be answered more strictly.
    rules.insert(libc::SYS_clone3, Vec::new());
    if signals_confined {
        rules.extend(SIGNALLING.iter().map(|&n| (n, Vec::new())));
    }
    let mut when = |number: c_long, conditions: &[(u8, Len, Op, u64)]| -> Result<()> {
        let conditions = conditions
            .iter()
            .map(|(index, len, op, value)| {
                SeccompCondition::new(*index, len.clone(), op.clone(), *value)
            })
            .collect::<Result<Vec<_>, _>>()?;
        rules
            .entry(number)
            .or_default()
            .push(SeccompRule::new(conditions)?);
        Ok(())
    };
    when(
        libc::SYS_clone,
        &[(0, Len::Qword, Op::MaskedEq(NAMESPACE_FLAGS), 0)],
    )?;
    // One's own limits only, and the kernel lets nobody unprivileged raise a hard one.
    when(libc::SYS_prlimit64, &[(0, Len::Dword, Op::Eq, 0)])?;
    #[cfg(target_arch = "x86_64")]
    when(libc::SYS_setrlimit, &[(0, Len::Dword, Op::Le, 15)])?;
    // Not the owner of a descriptor's signals.
    let owner = |command: i32| (1, Len::Dword, Op::Ne, command as u64);
    when(
        libc::SYS_fcntl,
        &[owner(libc::F_SETOWN), owner(F_SETSIG), owner(F_SETOWN_EX)],
    )?;
    for request in [
        libc::TCGETS,
        libc::FIONREAD,
        libc::TIOCGWINSZ,
        libc::FIONBIO,
        libc::FIOCLEX,
        libc::FIONCLEX,
    ] {
        when(libc::SYS_ioctl, &[(1, Len::Dword, Op::Eq, request)])?;
    }
    for option in [
        libc::PR_SET_NAME,
        libc::PR_GET_NAME,
        libc::PR_GET_DUMPABLE,
        PR_SET_VMA,
    ] {
        when(libc::SYS_prctl, &[(0, Len::Dword, Op::Eq, option as u64)])?;
    }
    // A connected pair of unix streams: a datagram socket could be sent to any path.
    when(
        libc::SYS_socketpair,
        &[
            (0, Len::Dword, Op::Eq, libc::AF_UNIX as u64),
            (1, Len::Dword, Op::MaskedEq(0xf), libc::SOCK_STREAM as u64),
        ],
    )?;
    when(libc::SYS_sendto, &[(4, Len::Qword, Op::Eq, 0)])?;
    Ok(rules)
}

const F_SETSIG: i32 = 10;
const F_SETOWN_EX: i32 = 15;
const PR_SET_VMA: i32 = 0x53564d41;

fn compile(rules: Rules, otherwise: SeccompAction, matching: SeccompAction) -> Result<Vec<u8>> {
    let arch: TargetArch = std::env::consts::ARCH
        .try_into()
        .context("seccomp: this processor architecture is not supported")?;
    let filter = SeccompFilter::new(rules, otherwise, matching, arch)?;
    let program: seccompiler::BpfProgram = filter.try_into()?;
    let mut bytes = Vec::with_capacity(program.len() * 8);
    for instruction in program {
        bytes.extend_from_slice(&instruction.code.to_ne_bytes());
        bytes.extend_from_slice(&[instruction.jt, instruction.jf]);
        bytes.extend_from_slice(&instruction.k.to_ne_bytes());
    }
    Ok(bytes)
}
