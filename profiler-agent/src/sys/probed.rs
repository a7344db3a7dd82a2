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
mod functions {
    use std::arch::naked_asm;

    #[unsafe(naked)]
    pub(super) extern "C" fn emulated(value: u64) -> u64 {
        naked_asm!("push rbp", "mov rax, rdi", "pop rbp", "ret")
    }

    /// Another one than [`emulated`], also for a linker that folds what is the same.
    #[unsafe(naked)]
    pub(super) extern "C" fn emulated_return(value: u64) -> u64 {
        naked_asm!("push rbp", "mov rax, rdi", "nop", "pop rbp", "ret")
    }

    #[unsafe(naked)]
    pub(super) extern "C" fn stepped(value: u64) -> u64 {
        naked_asm!("mov rax, rdi", "ret")
    }
}

#[cfg(target_arch = "aarch64")]
mod functions {
    use std::arch::naked_asm;

    #[unsafe(naked)]
    pub(super) extern "C" fn emulated(value: u64) -> u64 {
        naked_asm!("nop", "ret")
    }

    /// As on x86-64.
    #[unsafe(naked)]
    pub(super) extern "C" fn emulated_return(value: u64) -> u64 {
        naked_asm!("nop", "nop", "ret")
    }

    #[unsafe(naked)]
    pub(super) extern "C" fn stepped(value: u64) -> u64 {
        naked_asm!("mov x1, x0", "ret")
    }
}

impl Probed {
    /// Where it begins.
    pub(crate) fn address(self) -> u64 {
        self.function() as usize as u64
    }

    /// Calls it.
    pub(crate) fn call(self, value: u64) -> u64 {
        self.function()(value)
    }

    fn function(self) -> extern "C" fn(u64) -> u64 {
        match self {
            Self::Emulated => functions::emulated,
            Self::EmulatedReturn => functions::emulated_return,
            Self::Stepped => functions::stepped,
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
