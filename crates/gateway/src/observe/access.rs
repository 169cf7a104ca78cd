//! A line for each request.

use std::time::Duration;

use portcullis_core::GrpcCode;

use super::Finished;
use crate::config::Log;

/// Writes the line, unless the file wants none, or it is one of many that succeeded.
pub(super) fn log(finished: &Finished, log: &Log) {
    let Some(path) = finished.asked.path.as_deref().filter(|_| log.access) else { return };
    let head = finished.head.as_ref();
    let refused = head.and_then(|head| head.refused);
    let succeeded = finished.whole && refused.is_none() && !finished.is_failure();
    if succeeded && log.sample.0 < 1.0 && fastrand::f64() >= log.sample.0 {
        return;
    }
    let first = finished.attempts.first().map(|attempt| attempt.began);
    let last = finished.attempts.last().map(|attempt| &attempt.endpoint);
    let stages = finished.record.stages(first, head.map(|head| head.after), finished.took);
    let trace = finished.record.trace;
    tracing::info!(
        target: "access",
        method = finished.asked.method.as_str(),
        path,
        route = finished.route().map(|route| &**route),
        status = head.map(|head| head.status.as_u16()),
        grpc_status = finished.grpc.map(GrpcCode::number),
        service = last.map(|endpoint| &**endpoint.service()),
        endpoint = last.map(|endpoint| &**endpoint.id()),
        attempts = last.map(|_| finished.attempts.len()),
        refused_by = refused.map(|(layer, _)| layer),
        reason = refused.map(|(_, reason)| reason),
        auth_ms = stages.auth.map(millis),
        limit_ms = stages.limit.map(millis),
        discovery_ms = stages.discovery.map(millis),
        balance_ms = stages.balance.map(millis),
        upstream_ms = stages.upstream.map(millis),
        head_ms = head.map(|head| millis(head.after)),
        body_ms = stages.body.map(millis),
        total_ms = millis(finished.took),
        bytes_in = finished.record.uploaded(),
        bytes_out = finished.down,
        complete = finished.whole,
        peer = finished.asked.peer.map(tracing::field::display),
        trace = trace.map(|trace| trace.to_string()),
        span = trace.map(|trace| format!("{:016x}", trace.span)),
    );
}

/// Three digits of a millisecond.
fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
