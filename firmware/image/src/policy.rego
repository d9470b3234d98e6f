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

# Trustee nests the report's fields under `evidence`.
report := input.snp.evidence

executables := 3 if report.measurement in query_reference_value("coffer_snp_launch_measurement")

# The verifier has checked the signature up to AMD's root. Here: it is the generation that the digest was computed for,
# and its firmware is not older than asked for.
hardware := 2 if {
	report.cpuid_fam_id in query_reference_value("coffer_snp_cpuid_family")
	report.cpuid_mod_id in query_reference_value("coffer_snp_cpuid_model")
	report.reported_tcb.bootloader >= query_reference_value("coffer_snp_minimum_bootloader")
	report.reported_tcb.tee >= query_reference_value("coffer_snp_minimum_tee")
	report.reported_tcb.snp >= query_reference_value("coffer_snp_minimum_snp")
	report.reported_tcb.microcode >= query_reference_value("coffer_snp_minimum_microcode")
}

# A guest that asks for a report does so at VMPL 0: there is nobody below the kernel.
configuration := 2 if {
	report.policy.debug_allowed == false
	report.policy.migrate_ma_allowed == false
	report.vmpl == 0
}

extensions := []
