//! The feature bits that a guest may be told of.
//!
//! A bit that is named here is passed on if the host has it; any other is
//! hidden. Left out are features with registers or state that nothing here
//! switches or emulates: MONITOR, SVM, SMX, performance counters, TSC_ADJUST,
//! speculation control, ARCH_CAPABILITIES, protection keys, five-level
//! paging, shadow stacks, XSAVES, machine checks, AMX and so on.

use bitflags::bitflags;

bitflags! {
    /// Leaf 1, ECX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Leaf1Ecx: u32 {
        const SSE3 = 1 << 0;
        const PCLMULQDQ = 1 << 1;
        const SSSE3 = 1 << 9;
        const FMA = 1 << 12;
        const CMPXCHG16B = 1 << 13;
        const PCID = 1 << 17;
        const SSE4_1 = 1 << 19;
        const SSE4_2 = 1 << 20;
        const MOVBE = 1 << 22;
        const POPCNT = 1 << 23;
        const AES = 1 << 25;
        const XSAVE = 1 << 26;
        const AVX = 1 << 28;
        const F16C = 1 << 29;
        const RDRAND = 1 << 30;
    }
}

bitflags! {
    /// Leaf 1, EDX; all but SEP and CLFSH also in leaf 0x8000_0001.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Leaf1Edx: u32 {
        const FPU = 1 << 0;
        const VME = 1 << 1;
        const DE = 1 << 2;
        const PSE = 1 << 3;
        const TSC = 1 << 4;
        const MSR = 1 << 5;
        const PAE = 1 << 6;
        const CX8 = 1 << 8;
        const SEP = 1 << 11;
        const PGE = 1 << 13;
        const CMOV = 1 << 15;
        const PAT = 1 << 16;
        const PSE36 = 1 << 17;
        const CLFSH = 1 << 19;
        const MMX = 1 << 23;
        const FXSR = 1 << 24;
        const SSE = 1 << 25;
        const SSE2 = 1 << 26;
    }
}

bitflags! {
    /// Leaf 7 subleaf 0, EBX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Leaf7Ebx: u32 {
        const FSGSBASE = 1 << 0;
        const BMI1 = 1 << 3;
        const AVX2 = 1 << 5;
        const FDP_EXCPTN_ONLY = 1 << 6;
        const SMEP = 1 << 7;
        const BMI2 = 1 << 8;
        const ERMS = 1 << 9;
        const INVPCID = 1 << 10;
        const FCS_FDS_ZERO = 1 << 13;
        const AVX512F = 1 << 16;
        const AVX512DQ = 1 << 17;
        const RDSEED = 1 << 18;
        const ADX = 1 << 19;
        const SMAP = 1 << 20;
        const AVX512IFMA = 1 << 21;
        const CLFLUSHOPT = 1 << 23;
        const CLWB = 1 << 24;
        const AVX512CD = 1 << 28;
        const SHA = 1 << 29;
        const AVX512BW = 1 << 30;
        const AVX512VL = 1 << 31;
    }
}

bitflags! {
    /// Leaf 7 subleaf 0, ECX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Leaf7Ecx: u32 {
        const AVX512VBMI = 1 << 1;
        const UMIP = 1 << 2;
        const AVX512VBMI2 = 1 << 6;
        const GFNI = 1 << 8;
        const VAES = 1 << 9;
        const VPCLMULQDQ = 1 << 10;
        const AVX512VNNI = 1 << 11;
        const AVX512BITALG = 1 << 12;
        const AVX512VPOPCNTDQ = 1 << 14;
        const RDPID = 1 << 22;
        const CLDEMOTE = 1 << 25;
        const MOVDIRI = 1 << 27;
        const MOVDIR64B = 1 << 28;
    }
}

bitflags! {
    /// Leaf 7 subleaf 0, EDX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Leaf7Edx: u32 {
        const FSRM = 1 << 4;
        const AVX512VP2INTERSECT = 1 << 8;
        const SERIALIZE = 1 << 14;
        const AVX512FP16 = 1 << 23;
    }
}

bitflags! {
    /// Leaf 7 subleaf 1, EAX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Leaf7Sub1Eax: u32 {
        const AVXVNNI = 1 << 4;
        const AVX512BF16 = 1 << 5;
        const FZLRM = 1 << 10;
        const FSRS = 1 << 11;
        const FSRC = 1 << 12;
        const AVXIFMA = 1 << 23;
    }
}

bitflags! {
    /// Leaf 0xD subleaf 1, EAX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct XsaveEax: u32 {
        const XSAVEOPT = 1 << 0;
        const XSAVEC = 1 << 1;
        const XGETBV1 = 1 << 2;
    }
}

bitflags! {
    /// Leaf 0x8000_0001, ECX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct ExtendedEcx: u32 {
        const LAHF = 1 << 0;
        const CR8_LEGACY = 1 << 4;
        const ABM = 1 << 5;
        const SSE4A = 1 << 6;
        const MISALIGNSSE = 1 << 7;
        const PREFETCHW = 1 << 8;
        const XOP = 1 << 11;
        const FMA4 = 1 << 16;
        const TBM = 1 << 21;
    }
}

bitflags! {
    /// Leaf 0x8000_0001, EDX: what leaf 1 does not have.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct ExtendedEdx: u32 {
        const SYSCALL = 1 << 11;
        const NX = 1 << 20;
        const MMXEXT = 1 << 22;
        const PDPE1GB = 1 << 26;
        const RDTSCP = 1 << 27;
        const LM = 1 << 29;
        const EXT_3DNOW = 1 << 30;
        const AMD_3DNOW = 1 << 31;
    }
}

bitflags! {
    /// Leaf 0x8000_0008, EBX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Leaf8000_0008Ebx: u32 {
        const CLZERO = 1 << 0;
        const XSAVEERPTR = 1 << 2;
        const WBNOINVD = 1 << 9;
    }
}

bitflags! {
    /// Leaf 0x8000_001A, EAX: hints on vector units.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct VectorHints: u32 {
        const FP128 = 1 << 0;
        const MOVU = 1 << 1;
        const FP256 = 1 << 2;
    }
}

bitflags! {
    /// Leaf 0x8000_0021, EAX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Leaf8000_0021Eax: u32 {
        const LFENCE_SERIALIZING = 1 << 2;
        const NULL_SELECTOR_CLEARS_BASE = 1 << 6;
        const SRSO_NO = 1 << 29;
    }
}

bitflags! {
    /// Leaf 0x8000_0021, ECX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Leaf8000_0021Ecx: u32 {
        const TSA_SQ_NO = 1 << 1;
        const TSA_L1_NO = 1 << 2;
    }
}

bitflags! {
    /// Leaf 0x4000_0001, EAX: KVM's paravirtual features.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct KvmFeatures: u32 {
        const CLOCKSOURCE = 1 << 0;
        const NO_IO_DELAY = 1 << 1;
        const CLOCKSOURCE2 = 1 << 3;
        const STEAL_TIME = 1 << 5;
        const PV_EOI = 1 << 6;
        const PV_UNHALT = 1 << 7;
        const PV_TLB_FLUSH = 1 << 9;
        const PV_SEND_IPI = 1 << 11;
        const CLOCKSOURCE_STABLE = 1 << 24;
    }
}

/// State components that XSAVE keeps, and the features that need them.
pub(super) mod xcr0 {
    pub(in super::super) const X87: u64 = 1 << 0;
    pub(in super::super) const SSE: u64 = 1 << 1;
    pub(in super::super) const AVX: u64 = 1 << 2;
    pub(in super::super) const AVX512: u64 = 7 << 5;
}

impl Leaf7Ebx {
    /// All of AVX-512 in this register.
    pub(super) const AVX512: Self = Self::AVX512F
        .union(Self::AVX512DQ)
        .union(Self::AVX512IFMA)
        .union(Self::AVX512CD)
        .union(Self::AVX512BW)
        .union(Self::AVX512VL);
}

impl Leaf7Ecx {
    /// All of AVX-512 in this register.
    pub(super) const AVX512: Self = Self::AVX512VBMI
        .union(Self::AVX512VBMI2)
        .union(Self::AVX512VNNI)
        .union(Self::AVX512BITALG)
        .union(Self::AVX512VPOPCNTDQ);
}

impl Leaf7Edx {
    /// All of AVX-512 in this register.
    pub(super) const AVX512: Self = Self::AVX512VP2INTERSECT.union(Self::AVX512FP16);
}
