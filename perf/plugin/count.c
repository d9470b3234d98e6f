/* count: a QEMU TCG plugin that says how many instructions ran where, from "now" to each stage of a guest's boot.
 *
 * Two uses:
 *   nested  QEMU is the rig: the machine runs Linux with KVM, and a VMM in it runs a guest. Code is told apart by who it belongs to: the
 *           guest (translated between VMRUN and the exit that follows it), the machine's kernel, and the machine's programs.
 *   direct  QEMU boots the guest's kernel itself: everything is the guest.
 *
 * A record begins and ends with a marker: `nopl DISP32(%rax,%rax,1)` with DISP32 = 0xc0ffee00 (begin) or 0xc0ffee01 (end), executed by the
 * harness. In direct use a record begins with the first instruction and ends with the process (or at the first program, with until=program).
 *
 * A repeated string instruction is one step per element under TCG and one instruction on a processor. Its steps are counted apart, so that
 * "instructions" holds none of them.
 *
 * Debian ships no qemu-plugin.h. The few declarations below restate the documented interface, version 1 (QEMU 4.2 to 8.x).
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
typedef uint64_t plugin_id;
struct tb;
struct insn;
typedef struct info info;
enum { CB_NO_REGS = 0, INLINE_ADD_U64 = 0 };
typedef void (*tb_trans_cb)(plugin_id, struct tb *);
typedef void (*exec_cb)(unsigned int cpu, void *data);
typedef void (*end_cb)(plugin_id, void *data);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, tb_trans_cb);
void qemu_plugin_register_vcpu_tb_exec_cb(struct tb *, exec_cb, int, void *);
void qemu_plugin_register_vcpu_insn_exec_cb(struct insn *, exec_cb, int, void *);
void qemu_plugin_register_vcpu_insn_exec_inline(struct insn *, int op, void *counter, uint64_t add);
void qemu_plugin_register_atexit_cb(plugin_id, end_cb, void *);
size_t qemu_plugin_tb_n_insns(const struct tb *);
struct insn *qemu_plugin_tb_get_insn(const struct tb *, size_t);
const void *qemu_plugin_insn_data(const struct insn *);
size_t qemu_plugin_insn_size(const struct insn *);
uint64_t qemu_plugin_insn_vaddr(const struct insn *);
EXPORT int qemu_plugin_version = 1;

enum { MARKER_BEGIN = 0xc0ffee00u, MARKER_END = 0xc0ffee01u };
/* Where Linux for x86-64 lives: loaded at 16 MiB, linked in the top 2 GiB. Below it are shim and firmware. */
static const uint64_t KERNEL_LOADED = 0x1000000, KERNEL_LOADED_END = 0x10000000, KERNEL_LINKED = 0xffffffff80000000;
static const uint64_t HALF = 0x0000800000000000;

enum class { FIRMWARE, KERNEL_EARLY, KERNEL, PROGRAM, STRING, HOST_KERNEL, HOST_PROGRAM, HOST_STRING, CLASSES };
static const char *const NAMES[CLASSES] = { "firmware", "kernel-early", "kernel", "program", "string-steps", "host-kernel", "host-program", "host-string-steps" };

struct cell { uint64_t address, count; uint32_t class; };
struct block { struct block *next; size_t n; struct cell cells[]; };
struct stage { char name[32]; uint64_t sums[CLASSES], entries; };

static struct block *blocks;
static bool nested, until_program;
static const char *out, *histogram;
/* State of the machine and of the record. One processor: nothing here is shared. */
static bool in_guest, recording, kernel_seen, linked_seen, program_seen;
static uint64_t after_vmrun, vmruns, base[CLASSES], base_vmruns;
static struct stage stages[64];
static unsigned n_stages, marks;

static void sums(uint64_t to[CLASSES]) {
    memset(to, 0, sizeof(uint64_t) * CLASSES);
    for (const struct block *b = blocks; b; b = b->next)
        for (size_t i = 0; i < b->n; i++) to[b->cells[i].class] += b->cells[i].count;
}

static void stage(const char *name) {
    if (!recording || n_stages == sizeof stages / sizeof *stages) return;
    struct stage *s = &stages[n_stages++];
    snprintf(s->name, sizeof s->name, "%s", name);
    sums(s->sums);
    for (int c = 0; c < CLASSES; c++) s->sums[c] -= base[c];
    s->entries = vmruns - base_vmruns;
}

static void begin(void) {
    recording = true;
    kernel_seen = linked_seen = program_seen = false;
    n_stages = marks = 0;
    sums(base);
    base_vmruns = vmruns;
}

static void end(void) {
    if (!recording) return;
    stage("end");
    recording = false;
    FILE *f = fopen(out, "a");
    if (!f) { fprintf(stderr, "count: cannot write %s\n", out); return; }
    fprintf(f, "{\"stages\":[");
    for (unsigned i = 0; i < n_stages; i++) {
        fprintf(f, "%s{\"stage\":\"%s\",\"guest-entries\":%" PRIu64, i ? "," : "", stages[i].name, stages[i].entries);
        for (int c = 0; c < CLASSES; c++) fprintf(f, ",\"%s\":%" PRIu64, NAMES[c], stages[i].sums[c]);
        fprintf(f, "}");
    }
    fprintf(f, "]}\n");
    fclose(f);
}

/* Steps per address of the guest, string steps with an s: for the table of where instructions go. */
static void write_histogram(void) {
    FILE *f = histogram ? fopen(histogram, "w") : NULL;
    if (!f) return;
    for (const struct block *b = blocks; b; b = b->next)
        for (size_t i = 0; i < b->n; i++)
            if (b->cells[i].count && b->cells[i].class < HOST_KERNEL)
                fprintf(f, "%" PRIx64 " %" PRIu64 "%s\n", b->cells[i].address, b->cells[i].count, b->cells[i].class == STRING ? " s" : "");
    fclose(f);
}

static void on_vmrun(unsigned cpu, void *data) { (void)cpu; (void)data; in_guest = true; vmruns++; }
static void on_exit_of_guest(unsigned cpu, void *data) { (void)cpu; (void)data; in_guest = false; }
static void on_marker(unsigned cpu, void *data) { (void)cpu; if (data) end(); else begin(); }
static void on_kernel(unsigned cpu, void *data) {
    (void)cpu; (void)data;
    if (!kernel_seen) { kernel_seen = true; stage("kernel-first-instruction"); }
}
static void on_linked(unsigned cpu, void *data) { (void)cpu; (void)data; linked_seen = true; }
static void on_program(unsigned cpu, void *data) {
    (void)cpu; (void)data;
    if (program_seen || !linked_seen) return;
    program_seen = true;
    stage("pid1-first-instruction");
    write_histogram();
    histogram = NULL; /* of the first boot alone */
    if (until_program) { end(); _exit(0); }
}
static void on_mark(unsigned cpu, void *data) {
    (void)cpu; (void)data;
    if (!program_seen) return;
    char name[32];
    snprintf(name, sizeof name, "mark-%u", marks++);
    stage(name);
}

static enum class class_of(uint64_t address, bool guest) {
    if (!guest) return address < HALF ? HOST_PROGRAM : HOST_KERNEL;
    if (address >= KERNEL_LINKED) return KERNEL;
    if (address >= HALF) return KERNEL;
    if (address >= KERNEL_LOADED && address < KERNEL_LOADED_END) return KERNEL_EARLY;
    if (linked_seen) return address < (1 << 20) ? KERNEL_EARLY : PROGRAM; /* below 1 MiB: the trampoline of further processors */
    return FIRMWARE;
}

/* A repeated movs, cmps, stos, lods or scas. */
static bool repeated_string(const uint8_t *code, size_t size) {
    bool repeated = false;
    for (size_t i = 0; i < size; i++) {
        uint8_t b = code[i];
        if (b == 0xf2 || b == 0xf3) { repeated = true; continue; }
        if (b == 0x66 || b == 0x67 || (b & 0xf0) == 0x40) continue;
        return repeated && ((b >= 0xa4 && b <= 0xa7) || (b >= 0xaa && b <= 0xaf));
    }
    return false;
}

/* Where programs of the guest are: not where the kernel was loaded, to which a PVH start returns after its first linked code. */
static bool of_a_program(uint64_t address) {
    return address >= (1 << 20) && address < HALF && !(address >= KERNEL_LOADED && address < KERNEL_LOADED_END);
}

static void on_translate(plugin_id id, struct tb *tb) {
    (void)id;
    size_t n = qemu_plugin_tb_n_insns(tb);
    if (!n) return;
    uint64_t first = qemu_plugin_insn_vaddr(qemu_plugin_tb_get_insn(tb, 0));
    /* The first code after VMRUN is the machine's again, whatever was thought until now. */
    if (nested && after_vmrun && first == after_vmrun) {
        in_guest = false;
        qemu_plugin_register_vcpu_tb_exec_cb(tb, on_exit_of_guest, CB_NO_REGS, NULL);
    }
    bool guest = !nested || in_guest;
    struct block *block = calloc(1, sizeof *block + n * sizeof(struct cell));
    if (!block) abort();
    block->n = n;
    block->next = blocks;
    blocks = block;
    for (size_t i = 0; i < n; i++) {
        struct insn *insn = qemu_plugin_tb_get_insn(tb, i);
        const uint8_t *code = qemu_plugin_insn_data(insn);
        size_t size = qemu_plugin_insn_size(insn);
        struct cell *cell = &block->cells[i];
        cell->address = qemu_plugin_insn_vaddr(insn);
        cell->class = class_of(cell->address, guest);
        if (repeated_string(code, size)) cell->class = guest ? STRING : HOST_STRING;
        qemu_plugin_register_vcpu_insn_exec_inline(insn, INLINE_ADD_U64, &cell->count, 1);
        if (guest && size == 1 && code[0] == 0xee && cell->address < HALF) /* out dx, al */
            qemu_plugin_register_vcpu_insn_exec_cb(insn, on_mark, CB_NO_REGS, NULL);
        if (nested && !guest && size == 3 && !memcmp(code, "\x0f\x01\xd8", 3)) {
            after_vmrun = cell->address + 3;
            qemu_plugin_register_vcpu_insn_exec_cb(insn, on_vmrun, CB_NO_REGS, NULL);
        }
        if (nested && !guest && size == 8 && !memcmp(code, "\x0f\x1f\x84\x00", 4)) {
            uint32_t marker;
            memcpy(&marker, code + 4, 4);
            if (marker == MARKER_BEGIN || marker == MARKER_END)
                qemu_plugin_register_vcpu_insn_exec_cb(insn, on_marker, CB_NO_REGS, marker == MARKER_END ? (void *)1 : NULL);
        }
    }
    if (!guest) return;
    if (first >= KERNEL_LOADED && first < KERNEL_LOADED_END) qemu_plugin_register_vcpu_tb_exec_cb(tb, on_kernel, CB_NO_REGS, NULL);
    if (first >= KERNEL_LINKED) qemu_plugin_register_vcpu_tb_exec_cb(tb, on_linked, CB_NO_REGS, NULL);
    if (of_a_program(first)) qemu_plugin_register_vcpu_tb_exec_cb(tb, on_program, CB_NO_REGS, NULL);
}

static void on_end(plugin_id id, void *data) {
    (void)id; (void)data;
    write_histogram();
    if (!nested) end();
}

EXPORT int qemu_plugin_install(plugin_id id, const info *about, int argc, char **argv) {
    (void)about;
    for (int i = 0; i < argc; i++) {
        if (!strncmp(argv[i], "out=", 4)) out = strdup(argv[i] + 4);
        else if (!strncmp(argv[i], "histogram=", 10)) histogram = strdup(argv[i] + 10);
        else if (!strcmp(argv[i], "nested=on")) nested = true;
        else if (!strcmp(argv[i], "until=program")) until_program = true;
        else { fprintf(stderr, "count: unknown argument %s\n", argv[i]); return -1; }
    }
    if (!out) { fprintf(stderr, "count: out=FILE is missing\n"); return -1; }
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
    qemu_plugin_register_atexit_cb(id, on_end, NULL);
    if (!nested) begin();
    return 0;
}
