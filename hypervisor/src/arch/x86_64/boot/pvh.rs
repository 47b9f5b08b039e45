//! From the loader's 32-bit entry to Rust in long mode.
//!
//! QEMU's `-kernel` and any other PVH loader enters in 32-bit protected mode,
//! paging off, with the address of the start-info structure in EBX. The page
//! tables made here map the first 4 GiB one to one, with all rights; they live
//! until [`paging`](super::super::paging) has built the final ones.
#![expect(unsafe_code, reason = "the machine's entry point is assembly")]

use core::arch::global_asm;

global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .balign 4
    .long 4                       // name size
    .long 4                       // descriptor size
    .long 18                      // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_entry

    .section .text.boot, "ax"
    .code32
    .global pvh_entry
pvh_entry:
    cld
    mov esp, offset boot_stack_top
    mov esi, ebx

    // Four page directories of 2 MiB pages, then the levels above them.
    mov edi, offset boot_pd
    mov eax, 0x83                 // present, writable, large
    xor ecx, ecx
2:  mov [edi + ecx * 8], eax
    mov dword ptr [edi + ecx * 8 + 4], 0
    add eax, 0x200000
    inc ecx
    cmp ecx, 2048
    jne 2b

    mov edi, offset boot_pdpt
    mov eax, offset boot_pd
    or eax, 3
    xor ecx, ecx
3:  mov [edi + ecx * 8], eax
    add eax, 0x1000
    inc ecx
    cmp ecx, 4
    jne 3b

    mov eax, offset boot_pdpt
    or eax, 3
    mov [boot_pml4], eax

    mov eax, cr4
    or eax, 0x20                  // PAE
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xc0000080           // EFER
    rdmsr
    or eax, 0x900                 // LME, NXE
    wrmsr
    mov eax, cr0
    or eax, 0x80010001            // PG, WP, PE
    and eax, 0x9fffffff           // caches on
    mov cr0, eax
    lgdt [boot_gdt_pointer]
    push 0x08
    mov eax, offset pvh_entry_64
    push eax
    retf

    .code64
pvh_entry_64:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov rsp, offset boot_stack_top
    xor ebp, ebp
    mov edi, esi
    call {main}
    ud2

    .section .rodata.boot, "a"
    .balign 8
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff      // 64-bit code
    .quad 0x00cf93000000ffff      // data
boot_gdt_pointer:
    .word . - boot_gdt - 1
    .long boot_gdt

    .section .bss.boot, "aw", @nobits
    .balign 4096
boot_pml4: .skip 4096
boot_pdpt: .skip 4096
boot_pd:   .skip 4 * 4096
    .global boot_stack
boot_stack: .skip 4096 + {stack_size}   // guard page below
boot_stack_top:
    "#,
    main = sym super::boot_main,
    stack_size = const super::STACK_SIZE,
);
