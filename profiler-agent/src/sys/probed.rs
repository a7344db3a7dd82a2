//! Functions of this program that are there to be probed, to learn what a probe costs and whether it works.

/// One of them. Each gives back its argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probed {
    /// Begins with an instruction that the kernel executes itself.
    Emulated,
    /// The same once more.
    EmulatedReturn,
    /// Begins with one that the kernel runs under a single-step trap.
    Stepped,
}

#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    ".pushsection .text.profiler_probed, \"ax\", @progbits",
    ".p2align 4",
    "profiler_probed_emulated:",
    "push rbp",
    "mov rax, rdi",
    "pop rbp",
    "ret",
    ".p2align 4",
    "profiler_probed_emulated_return:",
    "push rbp",
    "mov rax, rdi",
    "pop rbp",
    "ret",
    ".p2align 4",
    "profiler_probed_stepped:",
    "mov rax, rdi",
    "ret",
    ".popsection",
);

#[cfg(target_arch = "aarch64")]
core::arch::global_asm!(
    ".pushsection .text.profiler_probed, \"ax\", @progbits",
    "profiler_probed_emulated:",
    "nop",
    "ret",
    "profiler_probed_emulated_return:",
    "nop",
    "ret",
    "profiler_probed_stepped:",
    "mov x1, x0",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    fn profiler_probed_emulated(value: u64) -> u64;
    fn profiler_probed_emulated_return(value: u64) -> u64;
    fn profiler_probed_stepped(value: u64) -> u64;
}

impl Probed {
    /// Where it begins.
    pub(crate) fn address(self) -> u64 {
        self.function() as usize as u64
    }

    /// Calls it.
    pub(crate) fn call(self, value: u64) -> u64 {
        let function = self.function();
        // SAFETY: the functions above take a word and give it back, by the C calling convention; they touch nothing else.
        unsafe { function(value) }
    }

    fn function(self) -> unsafe extern "C" fn(u64) -> u64 {
        match self {
            Self::Emulated => profiler_probed_emulated,
            Self::EmulatedReturn => profiler_probed_emulated_return,
            Self::Stepped => profiler_probed_stepped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_give_back_what_they_get() {
        for probed in [Probed::Emulated, Probed::EmulatedReturn, Probed::Stepped] {
            assert_eq!(probed.call(7), 7, "{probed:?}");
        }
    }

    #[test]
    fn they_are_three() {
        let addresses = [Probed::Emulated, Probed::EmulatedReturn, Probed::Stepped].map(Probed::address);
        assert!(addresses[0] != addresses[1] && addresses[1] != addresses[2], "{addresses:x?}");
    }
}
