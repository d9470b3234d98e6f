package policy

import rego.v1

# Appraises SEV-SNP evidence of a guest that boots from a Coffer image (IGVM). The launch digest covers shim, page tables,
# CPUID and secrets pages' places, and the hashes of kernel, initramfs and command line; there is no firmware and no event
# log beside it. AR4SI values: 2 and 3 affirm, 33, 36 and 97 do not.

default executables := 33

default hardware := 97

default configuration := 36

default file_system := 0

default instance_identity := 0

default runtime_opaque := 0

default storage_opaque := 0

default sourced_data := 0

trust_claims := {
	"executables": executables,
	"hardware": hardware,
	"configuration": configuration,
	"file-system": file_system,
	"instance-identity": instance_identity,
	"runtime-opaque": runtime_opaque,
	"storage-opaque": storage_opaque,
	"sourced-data": sourced_data,
}

# Trustee's verifier has written claims in two shapes, and this policy reads both: the report's own fields under `evidence`, or
# flat names without the processor and the privilege level, which it had checked itself.

executables := 3 if measurement in query_reference_value("coffer_snp_launch_measurement")

measurement := m if {
	m := input.snp.evidence.measurement
} else := m if {
	m := input.snp.measurement
}

# The verifier has checked the signature up to AMD's root. Here: it is the generation that the digest was computed for,
# and its firmware is not older than asked for.
hardware := 2 if {
	every family in claimed(["cpuid_fam_id", "cpu_id_fam_id"]) {
		family in query_reference_value("coffer_snp_cpuid_family")
	}
	every model in claimed(["cpuid_mod_id", "cpu_id_mod_id"]) {
		model in query_reference_value("coffer_snp_cpuid_model")
	}
	at_least(tcb.bootloader, query_reference_value("coffer_snp_minimum_bootloader"))
	at_least(tcb.tee, query_reference_value("coffer_snp_minimum_tee"))
	at_least(tcb.snp, query_reference_value("coffer_snp_minimum_snp"))
	at_least(tcb.microcode, query_reference_value("coffer_snp_minimum_microcode"))
}

# What the report says under one of these names; a report of version 2 says null.
claimed(names) := {value |
	some name in names
	value := input.snp.evidence[name]
	value != null
}

tcb := t if {
	t := input.snp.evidence.reported_tcb
} else := t if {
	t := {
		"bootloader": input.snp.reported_tcb_bootloader,
		"tee": input.snp.reported_tcb_tee,
		"snp": input.snp.reported_tcb_snp,
		"microcode": input.snp.reported_tcb_microcode,
	}
}

# In Rego's order every number is more than null, and every text more than every number.
at_least(found, least) if {
	is_number(found)
	is_number(least)
	found >= least
}

# A guest that asks for a report does so at VMPL 0: there is nobody below the kernel.
configuration := 2 if {
	input.snp.evidence.policy.debug_allowed == false
	input.snp.evidence.policy.migrate_ma_allowed == false
	input.snp.evidence.vmpl == 0
}

configuration := 2 if {
	not input.snp.evidence
	input.snp.policy_debug_allowed == false
	input.snp.policy_migrate_ma == false
}

extensions := []
