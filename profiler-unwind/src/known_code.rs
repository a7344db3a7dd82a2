//! Code that no call frame information describes although its frames are known.

use std::ops::Range;

use object::elf::PT_INTERP;
use profiler_common::unwind::x86_64::BaseReg;
use profiler_common::unwind::{RuleKind, UnwindRule, aarch64};

use crate::elf::{Architecture, Elf};
use crate::limits;

/// The rule of code that has none of its own. Call frame information comes first.
pub(crate) struct KnownCode {
    /// As the ELF file states them.
    pub(crate) addresses: Range<u64>,
    pub(crate) rule: UnwindRule,
}

/// Stubs of the procedure linkage table. lld never describes them, binutils neither in static executables nor on
/// aarch64.
const PLT_SECTIONS: [&str; 4] = [".plt", ".plt.sec", ".plt.got", ".iplt"];

/// Bytes of musl's `_start`, up to the call that never returns: `endbr64; xor %rbp,%rbp; mov %rsp,%rdi;
/// lea _DYNAMIC,%rsi; and $-16,%rsp; call _start_c`. What follows it are other functions, `_start_c` after padding.
/// Source: musl arch/x86_64/crt_arch.h.
const ENTRY_BYTES_X86_64: u64 = 26;
/// The same on aarch64, seven instructions. Source: musl arch/aarch64/crt_arch.h.
const ENTRY_BYTES_AARCH64: u64 = 28;
/// Bytes of `_start` and `_dl_start_user` of glibc's dynamic linker. Source: glibc sysdeps/x86_64/dl-machine.h: RTLD_START.
const ENTRY_BYTES_LINKER_X86_64: u64 = 70;
/// How those begin: `mov %rsp,%rdi; call _dl_start`.
const LINKER_X86_64: [u8; 4] = [0x48, 0x89, 0xe7, 0xe8];

pub(crate) fn known_code(elf: &Elf<'_>) -> Vec<KnownCode> {
    let rule = plt_stub(elf.architecture);
    let stubs = PLT_SECTIONS.iter().filter_map(|name| elf.section(name));
    let stubs = stubs.map(|plt| {
        let end = plt.address.saturating_add(plt.bytes.len() as u64);
        KnownCode { addresses: plt.address..end, rule }
    });
    stubs.chain(entry(elf)).chain(static_musl(elf)).collect()
}

/// What musl calls `main` and the functions of threads from. They never return, so nothing is missed below them.
/// Source: musl src/env/__libc_start_main.c, src/thread/pthread_create.c.
const MUSL_FIRST: [&[u8]; 3] = [b"libc_start_main_stage2", b"start", b"start_c11"];
/// The same on all systems: `mov $15,%rax; syscall` on x86-64. glibc describes it.
const SIGNAL_RETURN: &[u8] = b"__restore_rt";

/// Functions of a statically linked musl that was built without call frame information, as Debian's is. `start` is a
/// name that anyone may have: it counts only beside one that musl alone has.
fn static_musl(elf: &Elf<'_>) -> Vec<KnownCode> {
    if elf.entry == 0 || elf.segment(PT_INTERP).is_some() {
        return Vec::new();
    }
    let mut is_musl = false;
    let mut known = Vec::new();
    elf.each_function(limits::SYMBOLS_MAX, limits::KNOWN_FUNCTION_BYTES_MAX, |name, addresses| {
        is_musl |= name == MUSL_FIRST[0];
        if MUSL_FIRST.contains(&name) {
            known.push(KnownCode { addresses, rule: UnwindRule::END });
        } else if name == SIGNAL_RETURN {
            // A handler returns to its first byte, and is looked up one before.
            let addresses = addresses.start.saturating_sub(1)..addresses.end;
            known.push(KnownCode { addresses, rule: UnwindRule::SIGNAL });
        }
    });
    if is_musl { known } else { Vec::new() }
}

/// Nothing has called the entry point. musl and glibc's dynamic linker do not say so.
fn entry(elf: &Elf<'_>) -> Option<KnownCode> {
    let bytes = match elf.architecture {
        Architecture::X86_64 if begins_as_linker(elf) => ENTRY_BYTES_LINKER_X86_64,
        Architecture::X86_64 => ENTRY_BYTES_X86_64,
        Architecture::Aarch64 => ENTRY_BYTES_AARCH64,
    };
    let addresses = elf.entry..elf.entry.checked_add(bytes)?;
    (elf.entry != 0).then_some(KnownCode { addresses, rule: UnwindRule::END })
}

fn begins_as_linker(elf: &Elf<'_>) -> bool {
    elf.loaded_from(elf.entry).is_some_and(|code| code.bytes.starts_with(&LINKER_X86_64))
}

/// A stub jumps with the stack as it was at the call; a lazy one of x86-64 pushes an index first, as binutils describes
/// it: `ff 25 GOT, 68 INDEX, e9 PLT0`, where the push ends at byte 11.
fn plt_stub(architecture: Architecture) -> UnwindRule {
    match architecture {
        Architecture::X86_64 => UnwindRule {
            kind: RuleKind::Plt as u8,
            base: BaseReg::Rsp as u8,
            fp: 0,
            scale: 11,
            cfa_offset: 8,
            fp_offset: 0,
        },
        Architecture::Aarch64 => UnwindRule {
            kind: RuleKind::LinkRegister as u8,
            base: aarch64::BaseReg::Sp as u8,
            fp: 0,
            scale: 0,
            cfa_offset: 0,
            fp_offset: 0,
        },
    }
}
