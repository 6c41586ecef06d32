# shellcheck shell=sh
# Settings of Open MPI that a job on several hosts needs; source this before mpirun.

# mpirun's daemons notice a lost host 6 to 8 seconds after it vanished, and then end the job (Open MPI's
# own choice is 8 minutes). The ranks notice it after 3 to 4 seconds (comm/mpi/lifeline.h) and have the
# time between to say which it was.
export OMPI_MCA_oob_tcp_keepalive_time=2
export OMPI_MCA_oob_tcp_keepalive_intvl=1
export OMPI_MCA_oob_tcp_keepalive_probes=6
