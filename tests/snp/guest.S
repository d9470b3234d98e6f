/* Kernels that do what a sound SNP guest never does, one for each name: the emulated machine must stop each in its own words. `tests/snp/guests`
   links this at 16 MiB. The shim enters it as it enters Linux: 64-bit mode, its page tables, all RAM validated, no GHCB of the kernel's. */
	.text
	.globl _start
#define PAGE 0x3000000
#define PVALIDATE .byte 0xf2, 0x0f, 0x01, 0xff
#define RMPADJUST .byte 0xf3, 0x0f, 0x01, 0xfe
#define VMGEXIT .byte 0xf3, 0x0f, 0x01, 0xd9
	.macro validate page, how
	mov $\page, %rax
	xor %ecx, %ecx
	mov $\how, %edx
	PVALIDATE
	.endm
	.macro message value
	mov $\value, %rax
	mov %rax, %rdx
	shr $32, %rdx
	mov $0xc0010130, %ecx
	wrmsr
	VMGEXIT
	.endm
_start:
#if defined(validates_twice)
	validate PAGE, 1
#elif defined(validates_a_launched_page)
	validate 0x10000, 1
#elif defined(touches_what_it_gave_up)
	validate PAGE, 0
	mov PAGE, %al
#elif defined(touches_the_shared_view)
	/* Tables of its own: the first gibibyte to itself with the C-bit, and once more behind it without. */
	mov $PAGE, %rdi
	mov $1, %ebx
	shl $47, %rbx
	mov $(PAGE + 0x1003), %rax
	or %rbx, %rax
	mov %rax, (%rdi)
	mov $0x83, %rax
	mov %rax, 0x1008(%rdi)
	or %rbx, %rax
	mov %rax, 0x1000(%rdi)
	mov %rdi, %rax
	or %rbx, %rax
	mov %rax, %cr3
	mov $0x41000000, %rsi
	mov (%rsi), %al
#elif defined(shares_without_giving_up)
	message (0x014 | PAGE | 2 << 52)
#elif defined(makes_a_vmsa_of_what_it_gave_up)
	/* A page is to hold a processor's state that is not validated any more. */
	validate PAGE, 0
	mov $PAGE, %rax
	xor %ecx, %ecx
	mov $0x10000, %edx
	RMPADJUST
#elif defined(uses_an_unknown_ghcb)
	message PAGE
#else
#error "which?"
#endif
	/* Not reached. A request to end, so that nobody waits for a machine that lets this pass. */
	message 0x100
	hlt

	.section .rodata, "a"
	.ascii "IKCFG_ST"
	.incbin "config.gz"
	.ascii "IKCFG_ED"
